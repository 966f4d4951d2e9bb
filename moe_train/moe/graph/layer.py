"""The dense graph-coupled layer: every token visits every expert, their results come home and are coupled there."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_train.config.graph import GraphConfig
from moe_train.moe.context import RoutingContext
from moe_train.moe.dense_exchange import DenseExchange
from moe_train.moe.graph.coupling import Coupled, Coupling
from moe_train.moe.graph.record import GraphRecord, diversity
from moe_train.moe.record import LayerOutput
from moe_train.ops.rotary import Rotary


class EveryExpert(Protocol):
    """The experts of this rank, each of which sees every token."""

    def __call__(self, x_RSD: Tensor, rotary: Rotary | None) -> Tensor:
        """Return what each of them makes of tokens [R, S, D]: [R, S, L, D]."""


class GraphLayer(nn.Module):
    """Experts, exchange and coupling; `forward` changes nothing: recomputation cannot count twice.

    Args:
        config: of the graph: how much is computed at a time, what is kept for the backward pass, the loss.
        exchange: brings tokens to experts and results home; all that expert parallelism changes.
        experts: those held on this rank.
        coupling: of all experts, where the token is at home.
    """

    def __init__(self, config: GraphConfig, exchange: DenseExchange, experts: nn.Module, coupling: Coupling) -> None:
        super().__init__()
        self.config = config
        self.exchange = exchange
        self.experts = experts
        self.coupling = coupling
        self.balance = diversity(config.orthogonality)

    @property
    def sees_sequences(self) -> bool:
        """Whether an expert looks at whole sequences: what is then computed at a time."""
        return self.config.expert == "block"

    def forward(
        self, x_BSD: Tensor, context: RoutingContext | None = None, rotary: Rotary | None = None
    ) -> LayerOutput:
        """Apply the layer.

        Args:
            x_BSD: [B, S, D] tokens.
            context: which of them are valid; None: all.
            rotary: rotations of the positions, for experts with attention.
        """
        if context is None:
            context = RoutingContext.of(torch.zeros(x_BSD.shape[:2], dtype=torch.int64, device=x_BSD.device))
        # Rows that are computed together: sequences, or tokens as sequences of length one.
        rows_BSD = x_BSD if self.sees_sequences else x_BSD.reshape(-1, 1, x_BSD.shape[-1])
        per_chunk = self.rows_at_a_time(rows_BSD)
        valid_BS = context.valid_T.view(rows_BSD.shape[:2])
        parts = [
            self.kept_or_not(chunk_BSD, valid_chunk_BS, rotary)
            for chunk_BSD, valid_chunk_BS in zip(
                torch.split(rows_BSD, per_chunk), torch.split(valid_BS, per_chunk), strict=True
            )
        ]
        record = parts[0].record
        for part in parts[1:]:
            record = record + part.record
        y_BSD = torch.cat([part.y_BSD for part in parts]) if len(parts) > 1 else parts[0].y_BSD
        return LayerOutput(y_BSD.view_as(x_BSD), record)

    def rows_at_a_time(self, rows_BSD: Tensor) -> int:
        """Return how many rows are computed together."""
        batch, length, _ = rows_BSD.shape
        return batch if self.config.chunk_tokens is None else max(1, self.config.chunk_tokens // length)

    def kept_or_not(self, x_BSD: Tensor, valid_BS: Tensor, rotary: Rotary | None) -> LayerOutput:
        """Compute a chunk; its activations are kept for the backward pass, or only its input is."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return self.couple(x_BSD, valid_BS, rotary)

        def tensors() -> list[Tensor]:
            output = self.couple(x_BSD, valid_BS, rotary)
            return [output.y_BSD, *output.record.tensors()]

        # Nothing is drawn inside, so that no random state has to be kept.
        y_BSD, *sums = checkpoint(tensors, use_reentrant=False, preserve_rng_state=False)
        return LayerOutput(y_BSD, GraphRecord.from_tensors(sums))

    def couple(self, x_BSD: Tensor, valid_BS: Tensor, rotary: Rotary | None) -> LayerOutput:
        """Send a chunk to all experts and couple what comes home."""
        results_RSLD = self.experts(self.exchange.dispatch(x_BSD), rotary)
        h_TED = self.exchange.combine(results_RSLD).flatten(0, 1)
        x_TD = x_BSD.flatten(0, 1)
        coupled: Coupled = self.coupling(h_TED)
        added_TED = h_TED - x_TD.unsqueeze(1) if self.sees_sequences else h_TED
        record = GraphRecord.of(added_TED, coupled, valid_BS.flatten(), self.balance)
        return LayerOutput(coupled.y_TD.view_as(x_BSD), record)

    def figures(self) -> dict[str, object]:
        """Return ``adjacency``: weights of the edges to expert i (row) per graph layer; and ``adjacency_entropy``.

        The entropy is that of the shares of an expert's sources, mean over experts and graph layers, in nats; 0: each
        listens to one expert only.
        """
        weights_MEE = self.coupling.adjacencies().detach().to("cpu", torch.float64)
        if weights_MEE.numel() == 0:
            return {}
        shares_MEE = weights_MEE / weights_MEE.sum(dim=2, keepdim=True).clamp(min=1e-30)
        entropy_ME = -torch.xlogy(shares_MEE, shares_MEE).sum(dim=2)
        return {"adjacency": weights_MEE.tolist(), "adjacency_entropy": float(entropy_ME.mean())}
