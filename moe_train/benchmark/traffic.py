"""Where the tokens of a rank go, and the bytes that this must cost: the closed forms of the exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.config.bench import ExchangeKind, Routing
from moe_train.dist.meter import METER
from moe_train.dist.world import World
from moe_train.moe.capacity import Plan
from moe_train.moe.dense_exchange import DenseExchange
from moe_train.moe.exchange import Exchange, Transit

ID_BYTES, WEIGHT_BYTES = 4, 4
"""Of one expert's id (int32) and of one weight (fp32) on their way."""


def logit_bias(routing: Routing, num_experts: int) -> Tensor:
    """Return what a routing adds to the logits of the experts, [E] fp32: nothing, or -log(r) for the r-th expert."""
    ranks_E = torch.arange(1, num_experts + 1, dtype=torch.float32)
    return -ranks_E.log() if routing == "zipf" else torch.zeros(num_experts)


def draw_plan(routing: Routing, num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> Plan:
    """Return where random tokens go: standard normal logits with a bias, the K best, softmax over these.

    The weights [T, K] are a leaf that asks for its gradient.
    """
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator) + logit_bias(routing, num_experts)
    best = logits_TE.topk(top_k, dim=1)
    weights_TK = best.values.softmax(dim=1).requires_grad_()
    return Plan(best.indices, weights_TK, torch.ones_like(best.indices, dtype=torch.bool), all_kept=True)


@dataclass(frozen=True)
class Visits:
    """Where tokens go that start on some ranks.

    Attributes:
        tokens: number of them.
        others: (token, rank) pairs: other ranks to which a token goes, because an expert of its choice is there.
        nodes: (token, node) pairs: other nodes to which it goes.
        onward: (token, rank) pairs: ranks with another place in their node than the token's own; by rails a token comes
            to the rank of its own place first, and from there to these.
    """

    tokens: int = 0
    others: int = 0
    nodes: int = 0
    onward: int = 0

    def __add__(self, more: Visits) -> Visits:
        return Visits(
            self.tokens + more.tokens, self.others + more.others, self.nodes + more.nodes, self.onward + more.onward
        )

    @staticmethod
    def of(plan: Plan, num_experts: int, rank: int, num_ranks: int, node_size: int) -> Visits:
        """Count those of one rank's tokens.

        Args:
            plan: their experts.
            num_experts: E, in equal runs over the ranks.
            rank: where the tokens start.
            num_ranks: of the EP group, which is the world.
            node_size: ranks of a node; divides that number.
        """
        home_TK = torch.where(plan.kept_TK, plan.experts_TK // (num_experts // num_ranks), num_ranks)
        goes_TP = F.one_hot(home_TK, num_ranks + 1).amax(dim=1)[:, :num_ranks].bool()
        goes_TMN = goes_TP.view(len(home_TK), -1, node_size)
        node, place = divmod(rank, node_size)
        nodes_TM = goes_TMN.any(dim=2)
        return Visits(
            tokens=len(home_TK),
            others=int(goes_TP.sum() - goes_TP[:, rank].sum()),
            nodes=int(nodes_TM.sum() - nodes_TM[:, node].sum()),
            onward=int(goes_TP.sum() - goes_TMN[:, :, place].sum()),
        )

    def of_all(self, world: World) -> Visits:
        """Return the sum over all ranks. Collective."""
        counts = torch.tensor([self.tokens, self.others, self.nodes, self.onward])
        return Visits(*(int(n) for n in world.sum_on_host(counts).tolist()))

    def journeys(self, kind: ExchangeKind | str, num_ranks: int) -> int:
        """Return how often a token travels between two ranks (there and back): once for each leg of the exchange."""
        match kind:
            case "alltoall":
                return self.others
            case "hierarchical":
                return self.nodes + self.onward
            case "allgather":
                return self.tokens * (num_ranks - 1)
        assert kind == "local", f"no closed form for an exchange of kind {kind}"
        return 0


def journey_bytes(dim: int, top_k: int, value_bytes: int) -> int:
    """Return what one token's journey to one rank and home costs, forwards and backwards.

    Out D · b + K · (w + 4), home D · b; backwards the same without the 4 of each id (`AllToAllExchange`).
    """
    forwards = 2 * dim * value_bytes + top_k * (WEIGHT_BYTES + ID_BYTES)
    return forwards + 2 * dim * value_bytes + top_k * WEIGHT_BYTES


@dataclass(frozen=True)
class Moved:
    """What a pass over all ranks has moved, and what it should have.

    Attributes:
        other_bytes: to other ranks, as the meter counts them.
        between_bytes: those to ranks of other nodes.
        closed_bytes: to other ranks, by the closed form.
        collectives: of one rank; those of counts are not metered.
        tokens: of all ranks.
    """

    other_bytes: int
    between_bytes: int
    closed_bytes: int
    collectives: int
    tokens: int

    @property
    def facts(self) -> dict[str, float]:
        """Of one pass, per token."""
        return {
            "bytes_per_token": self.other_bytes / self.tokens,
            "closed_form_bytes_per_token": self.closed_bytes / self.tokens,
            "between_nodes_bytes_per_token": self.between_bytes / self.tokens,
            "collectives": float(self.collectives),
        }


def metered(work: Callable[[], object], world: World, closed_bytes: int, tokens: int) -> Moved:
    """Run one pass and return what it moved over all ranks. Collective.

    Args:
        work: forward and backward.
        world: the ranks.
        closed_bytes: what it should move.
        tokens: of all ranks.
    """
    METER.take_ms()
    work()
    sums = world.sum_on_host(torch.tensor([METER.inside_bytes, METER.between_bytes])).tolist()
    inside_bytes, between_bytes = (int(n) for n in sums)
    return Moved(inside_bytes + between_bytes, between_bytes, closed_bytes, METER.calls, tokens)


@dataclass
class Watched:
    """An exchange that counts, when asked to, where tokens go.

    Attributes:
        inner: the exchange.
        num_experts: E.
        rank: this one.
        num_ranks: of the EP group, which is the world.
        node_size: ranks of a node.
        watches: whether it counts.
        seen: so far.
    """

    inner: Exchange
    num_experts: int
    rank: int
    num_ranks: int
    node_size: int
    watches: bool = False
    seen: Visits = field(default_factory=Visits)

    @property
    def experts(self) -> range:
        """Places of the experts that this rank holds."""
        return self.inner.experts

    @property
    def dense(self) -> DenseExchange:
        """How all tokens reach all experts."""
        return self.inner.dense

    def for_experts(self, num_experts: int) -> Exchange:
        """Return the exchange of a layer with so many experts, which counts nothing."""
        return self.inner.for_experts(num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Transit:
        """Send the tokens off, and count where to."""
        if self.watches:
            self.seen += Visits.of(plan, self.num_experts, self.rank, self.num_ranks, self.node_size)
        return self.inner.dispatch(x_TD, plan)
