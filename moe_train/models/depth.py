"""Blocks that take only some tokens of each sequence: Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

The others pass such a block by, bit for bit. Those that it takes meet only each other in its attention, in their order
and with their own positions, so that the work of the block shrinks with their number and that of its scores with its
square. In training they are the best of the whole sequence; where later tokens are not known, each decides for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.model import ModelConfig
from moe_train.models.blocks import Block, BlockOutput, CoupledBlocks, TransformerBlock
from moe_train.models.memory import Memory
from moe_train.moe.context import RoutingContext
from moe_train.moe.foresight import Foresighted
from moe_train.moe.modules import Linear
from moe_train.moe.record import ExpertLayer, LayerRecord, LossPerToken
from moe_train.moe.roles import Kind, Role
from moe_train.ops.keep import decide
from moe_train.ops.rotary import Rotary

PART = "depth"
"""Of a block: what its record of the choice is called (`LayerKey.part`)."""


def depth_of(config: ModelConfig, layer: int) -> MixtureOfDepthsConfig | None:
    """Return how block number ``layer`` (from 0) chooses its tokens: the last of each ``every``; None: it takes all.

    Blocks beyond the model's own, those of multi-token prediction, take all.
    """
    depth = config.depth
    if not isinstance(depth, MixtureOfDepthsConfig) or layer >= config.layers:
        return None
    return depth if (layer + 1) % depth.every == 0 else None


def num_taken(config: MixtureOfDepthsConfig, length: int) -> int:
    """Return how many of ``length`` tokens a block takes at most: ceil(capacity · length).

    The capacity is the decimal number that was configured: 0.07 of 100 tokens are 7, which binary ones round up to 8.
    """
    return math.ceil(Fraction(str(config.capacity)) * length)


@dataclass(frozen=True)
class Passage:
    """Which tokens a block takes: decided once, also where the backward pass computes again.

    Attributes:
        indices_BC: [B, C] int64, distinct in a row: the taken tokens of each sequence in order, then, where it has
            fewer than others, tokens that only fill up the row. Later than all taken ones, they are seen by none.
        valid_BC: [B, C] bool, which of them are taken; None: all.
        taken_BS: [B, S] bool, the same for every token.
        best_BS: [B, S] bool, the valid tokens with the highest scores.
        willing_BS: [B, S] bool, the valid tokens that the causal choice takes.
        is_empty: whether nothing is taken.
    """

    indices_BC: Tensor
    valid_BC: Tensor | None
    taken_BS: Tensor
    best_BS: Tensor
    willing_BS: Tensor
    is_empty: bool = False


def best_tokens(scores_BS: Tensor, valid_BS: Tensor, count: int) -> Tensor:
    """Return which tokens [B, S] bool are the ``count`` best valid ones of their sequence; all, where it has fewer.

    Scores count as fp32 numbers, and of equal ones the earlier token wins: what differs between layouts, the last bits
    of fp64, decides nothing.
    """
    ranking_BS = scores_BS.to(torch.float32).masked_fill(~valid_BS, float("-inf"))
    order_BC = ranking_BS.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(valid_BS).scatter(1, order_BC, True) & valid_BS


def in_front(taken_BS: Tensor, count: int) -> Tensor:
    """Return the indices [B, count] of the taken tokens of each sequence in order, then of others in order."""
    return (~taken_BS).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


class DepthRouter(nn.Module):
    """Scores tokens: who passes the block where the whole sequence is known, and who would where it is not.

    Args:
        dim: width D.
        config: of the depth.
        init_std: standard deviation of the initial weights.
    """

    def __init__(self, dim: int, config: MixtureOfDepthsConfig, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.weight_D = nn.Parameter(torch.empty(dim))
        self.roles = {"weight_D": Role(Kind.ROUTER, init_std)}
        hidden, is_predicted = config.predictor_dim, config.causal == "predictor"
        self.hidden = Linear(dim, hidden, init_std, biased=True) if is_predicted else None
        self.verdict = Linear(hidden, 1, init_std, biased=True) if is_predicted else None
        self.balance = LossPerToken("depth_loss", config.causal_coef)

    def scores(self, x_BSD: Tensor) -> Tensor:
        """Return r = w · x (section 3.4 of the paper) of tokens [B, S, D]: [B, S], at least fp32."""
        precise = torch.promote_types(x_BSD.dtype, torch.float32)
        return x_BSD.to(precise) @ self.weight_D.to(precise)

    def gates(self, scores: Tensor) -> Tensor:
        """Return what a block's output is multiplied with (eq. 1), in the shape of the scores."""
        return scores if self.config.weight == "linear" else scores.sigmoid()

    def causal_logits(self, x_BSD: Tensor, scores_BS: Tensor) -> Tensor:
        """Return [B, S] numbers that are positive for tokens to be taken, of each token alone (section 3.5)."""
        if self.hidden is None or self.verdict is None:
            return scores_BS
        # What the predictor learns stays with it: the model does not bend to be predictable.
        hidden_BSN = self.hidden(x_BSD.detach().to(scores_BS.dtype)).relu()
        logits_BS1: Tensor = self.verdict(hidden_BSN)
        return logits_BS1.squeeze(-1)

    def figures(self) -> dict[str, object]:
        """Return nothing: all figures are of tokens."""
        return {}


class DepthBlock(TransformerBlock, Foresighted):
    """x + gate · (what the block adds) for the tokens that it takes, x for the others (eq. 1 of the paper).

    Args:
        block: what the taken tokens pass.
        dim: width D.
        config: of the depth.
        init_std: standard deviation of the router's initial weights.
    """

    def __init__(self, block: Block | CoupledBlocks, dim: int, config: MixtureOfDepthsConfig, init_std: float) -> None:
        super().__init__()
        self.router = DepthRouter(dim, config, init_std)
        self.block = block

    @property
    def expert_layers(self) -> dict[str, ExpertLayer]:
        """The choice of tokens, then what the inner block has."""
        return {PART: self.router, **self.block.expert_layers}

    @property
    def inner(self) -> TransformerBlock:
        """The block that some tokens pass."""
        return self.block.inner

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, context: RoutingContext, memory: Memory | None = None
    ) -> BlockOutput:
        """Apply to the residual stream [B, S, D].

        The inner block always runs, if need be on tokens whose results are thrown away: other ranks may wait for it.

        Args:
            x_BSD: [B, S, D].
            rotary: table of the positions; None where these enter elsewhere.
            context: of these tokens.
            memory: of the tokens that this block took so far, to which it adds those that it takes now; one sequence.
        """
        scores_BS = self.router.scores(x_BSD)
        logits_BS = self.router.causal_logits(x_BSD, scores_BS)
        passage = decide(lambda: self.choose(scores_BS, logits_BS, context, memory))
        record = DepthRecord.of(passage, logits_BS, context)
        rows_N = flat_rows(passage.indices_BC, context.length)
        x_BCD = x_BSD.flatten(0, 1).index_select(0, rows_N).view(*passage.indices_BC.shape, -1)
        added: BlockOutput = self.block(
            x_BCD,
            None if rotary is None else rotary.at(passage.indices_BC),
            context.chosen(passage.indices_BC, passage.valid_BC),
            None if passage.is_empty else memory,
            residual=False,
        )
        gates_BC1 = self.router.gates(scores_BS.gather(1, passage.indices_BC)).unsqueeze(-1)
        y_BCD = x_BCD + (gates_BC1 * added.x_BSD).to(x_BCD.dtype)
        if passage.valid_BC is not None:
            y_BCD = torch.where(passage.valid_BC.unsqueeze(-1), y_BCD, x_BCD)
        # What passes by is copied: to add zeros would make +0 of -0.
        y_BSD = x_BSD.flatten(0, 1).index_copy(0, rows_N, y_BCD.flatten(0, 1)).view_as(x_BSD)
        return BlockOutput(y_BSD, (record, *added.records))

    def choose(
        self, scores_BS: Tensor, logits_BS: Tensor, context: RoutingContext, memory: Memory | None = None
    ) -> Passage:
        """Decide which tokens are taken; waits for the device only where later tokens are not known."""
        valid_BS = context.valid_T.view_as(scores_BS)
        count = num_taken(self.router.config, context.length)
        best_BS = best_tokens(scores_BS, valid_BS, count)
        willing_BS = (logits_BS > 0) & valid_BS  # a probability above one half
        if self.knows_later_tokens and memory is None:
            indices_BC = in_front(best_BS, count)
            valid_BC = None if context.valid_BS is None else best_BS.gather(1, indices_BC)
            return Passage(indices_BC, valid_BC, best_BS, best_BS, willing_BS)
        most = willing_BS.sum(dim=1).amax()
        if memory is None:
            # As many rows on all ranks: some exchanges send tokens, or ask routers of all ranks, row by row.
            most = context.peers.gather(most.view(1))[0].amax()
        else:
            assert len(scores_BS) == 1, "a memory is of one sequence: others would have taken other numbers of tokens"
        indices_BC = in_front(willing_BS, max(1, int(most)))
        is_empty = int(most) == 0
        return Passage(indices_BC, willing_BS.gather(1, indices_BC), willing_BS, best_BS, willing_BS, is_empty)


def flat_rows(indices_BC: Tensor, length: int) -> Tensor:
    """Return the places [B · C] of chosen tokens among all [B · S]."""
    first_B1 = torch.arange(len(indices_BC), device=indices_BC.device).unsqueeze(1) * length
    return (first_B1 + indices_BC).flatten()


@dataclass(frozen=True)
class DepthRecord(LayerRecord):
    """Which valid tokens a block took, and which it would take without knowing later ones. The statistic is its loss.

    Attributes:
        taken: scalar int64, tokens that passed the block.
        willing: scalar int64, tokens that the causal choice takes.
        right: scalar int64, tokens about which the causal choice says what the best of the sequence say.
    """

    taken: Tensor
    willing: Tensor
    right: Tensor

    @staticmethod
    def of(passage: Passage, logits_BS: Tensor, context: RoutingContext) -> DepthRecord:
        """Sum up one forward pass; the statistic is the summed binary cross-entropy in nats, [1] fp64."""
        valid_BS = context.valid_T.view_as(logits_BS)
        wanted_BS = passage.best_BS.to(torch.float64)
        errors_BS = F.binary_cross_entropy_with_logits(logits_BS.to(torch.float64), wanted_BS, reduction="none")
        return DepthRecord(
            tokens=valid_BS.sum(),
            taken=passage.taken_BS.sum(),
            willing=passage.willing_BS.sum(),
            right=((passage.willing_BS == passage.best_BS) & valid_BS).sum(),
            statistics=((errors_BS * valid_BS).sum().view(1),),
        )

    def figures(self) -> dict[str, object]:
        """Return what is written down of the block.

        ``chosen_share``: of the tokens, those that passed it. ``causal_share``: those that the causal choice takes.
        ``causal_accuracy``: share of the tokens about which it agrees with the choice that knows the whole sequence.
        """
        tokens = max(1, self.tokens.item())
        named = {"chosen_share": self.taken, "causal_share": self.willing, "causal_accuracy": self.right}
        return {name: count.item() / tokens for name, count in named.items()}
