"""How many ranks a token visits in the layers of a model in training, and the bytes that this costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.benchmark.traffic import Visits, Watched, journey_bytes, metered
from moe_train.config.schema import TrainConfig
from moe_train.dist.mesh import Layout
from moe_train.dist.world import World
from moe_train.models.transformer import PRECISIONS, Transformer
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange import Transit
from moe_train.moe.exchange.choose import choice_for
from moe_train.moe.layer import MoELayer


@dataclass
class RankVisits(Watched):
    """An exchange that counts, when asked to, how many ranks each token visits; its own rank is one of them.

    Attributes:
        tokens_R: [P + 1] int64, tokens that visited r ranks.
    """

    tokens_R: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send the tokens off, and count where to."""
        if self.watches:
            ranks_T = ranks_visited(plan, self.num_experts, self.num_ranks)
            counts_R = torch.bincount(ranks_T, minlength=self.num_ranks + 1).cpu()
            self.tokens_R = counts_R if len(self.tokens_R) == 0 else self.tokens_R + counts_R
        return super().dispatch(x_TD, plan)


def ranks_visited(plan: Plan, num_experts: int, num_ranks: int) -> Tensor:
    """Return [T] int64: on how many ranks the kept experts of each token are.

    Args:
        plan: the tokens' experts.
        num_experts: E, in equal runs over the ranks.
        num_ranks: P.
    """
    home_TK = torch.where(plan.kept_TK, plan.experts_TK // (num_experts // num_ranks), num_ranks)
    return F.one_hot(home_TK, num_ranks + 1).amax(dim=1)[:, :num_ranks].sum(dim=1)


@dataclass(frozen=True)
class Travelled:
    """What some optimizer steps moved.

    Attributes:
        tokens_R: tokens that visited r ranks in a layer, their own included, over all layers and steps.
        bytes_per_token: to other ranks, of all layers, forwards and backwards, as the meter counts them.
        closed_bytes_per_token: the same by the closed form, from where tokens were routed.
    """

    tokens_R: tuple[int, ...]
    bytes_per_token: float
    closed_bytes_per_token: float

    @property
    def mean_ranks(self) -> float:
        """Ranks that a token visits in a layer, on average."""
        return sum(ranks * tokens for ranks, tokens in enumerate(self.tokens_R)) / sum(self.tokens_R)

    @property
    def most_ranks(self) -> int:
        """Ranks that a token visited at most."""
        return max(ranks for ranks, tokens in enumerate(self.tokens_R) if tokens)


def watch_ranks(model: Transformer, config: TrainConfig, world: World) -> list[RankVisits]:
    """Put something that counts before the exchange of each sparse layer; the EP group is the world."""
    watched = []
    for layer in model.moe_layers.values():
        assert isinstance(layer, MoELayer), "dense layers send all tokens everywhere"
        seen = RankVisits(layer.exchange, config.model.ffn.num_experts, world.rank, world.size, world.size)
        layer.exchange = seen
        watched.append(seen)
    return watched


def travelled(
    work: Callable[[], object], steps: int, watched: list[RankVisits], config: TrainConfig, world: World
) -> Travelled:
    """Run some optimizer steps and return what they moved. Collective.

    Args:
        work: all the steps; each forward pass is followed by its backward pass.
        steps: how many these are.
        watched: what `watch_ranks` returned.
        config: of the training.
        world: the ranks.
    """
    ffn, layout = config.model.ffn, Layout(world.size, world.size)
    tokens = steps * config.train.global_batch * config.data.seq_len
    for seen in watched:
        seen.watches = True
    found = metered(work, world, closed_bytes=0, tokens=tokens)
    for seen in watched:
        seen.watches = False
    kind = choice_for(layout, ffn.num_experts, False, config.parallel, ffn.top_k, world.size).kind
    once = journey_bytes(config.model.dim, ffn.top_k, PRECISIONS[config.train.precision].activations.itemsize)
    visits = sum((seen.seen for seen in watched), Visits()).of_all(world)
    tokens_R = world.sum_on_host(torch.stack([seen.tokens_R for seen in watched]).sum(dim=0))
    closed = once * visits.journeys(kind, world.size) / tokens
    return Travelled(tuple(int(n) for n in tokens_R.tolist()), found.other_bytes / tokens, closed)
