"""The sums of one optimizer step, from which its record is made.

Sums stay on the device; they travel over the ranks, and to the host, only for the steps that are recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_train.dist.comm import sum_over
from moe_train.dist.mesh import Mesh
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.layer import MoELayer


@dataclass
class Tally:
    """Sums over the micro-batches of this rank.

    Attributes:
        layers: the MoE layers by depth.
        loss_sum: summed cross-entropy in nats; None before the first micro-batch.
        records: per MoE layer the sums of its router over the micro-batches, without gradients.
    """

    layers: dict[int, MoELayer]
    loss_sum: Tensor | None = None
    records: list[RoutingRecord] = field(default_factory=list)

    def add(self, loss_sum: Tensor, records: tuple[RoutingRecord, ...]) -> None:
        """Add one micro-batch."""
        loss_sum = loss_sum.detach().to(torch.float64)
        self.loss_sum = loss_sum if self.loss_sum is None else self.loss_sum + loss_sum
        self.records = (
            [add(a, b) for a, b in zip(self.records, records, strict=True)] if self.records else list(records)
        )
        self.records = [detached(record) for record in self.records]

    def measure(self, tokens: int, mesh: Mesh) -> dict[str, object]:
        """Sum over the ranks and return the step's figures. Collective; waits for the device.

        Args:
            tokens: valid tokens of the step over all ranks.
            mesh: the groups.

        Returns:
            ``loss``, ``aux_loss`` and ``z_loss`` (means over the MoE layers, unweighted) and, per MoE layer, ``load``,
            ``dropped_fraction``, ``max_violation``, ``entropy`` and ``dead_experts``.
        """
        assert self.loss_sum is not None, "a step has at least one micro-batch"
        flat = torch.cat([self.loss_sum.view(1), *(pack(record) for record in self.records)])
        total = sum_over(flat, mesh.world).cpu()
        figures: dict[str, object] = {"loss": total[0].item() / tokens}
        aux, z = [], []
        start = 1
        for (depth, layer), packed in zip(self.layers.items(), self.records, strict=True):
            record = unpack(total[start : start + packed.counts_E.numel() * 2 + SCALARS], packed.counts_E.numel())
            start += packed.counts_E.numel() * 2 + SCALARS
            aux.append(layer.balance.aux_sum(record, record.counts_E).item() / tokens)
            z.append(record.z_sum.item() / tokens)
            figures |= {f"moe/layer_{depth:02d}/{k}": v for k, v in layer_figures(record, tokens).items()}
        if aux:
            figures |= {"aux_loss": sum(aux) / len(aux), "z_loss": sum(z) / len(z)}
        return figures


SCALARS = 4
"""Scalars of a record, beside its two vectors over experts."""


def pack(record: RoutingRecord) -> Tensor:
    """Return a record as one fp64 vector, which is exact for counts below 2^53."""
    scalars = [record.dropped, record.sequence_balance_sum, record.z_sum, record.entropy_sum]
    vectors = [record.counts_E, record.probability_sum_E]
    return torch.cat([v.to(torch.float64).view(-1) for v in (*vectors, *scalars)])


def unpack(flat: Tensor, num_experts: int) -> RoutingRecord:
    """Return the record of a vector made by `pack`."""
    counts_E, probability_sum_E, (dropped, balance, z, entropy) = torch.split(flat, [num_experts, num_experts, SCALARS])
    return RoutingRecord(counts_E, dropped, probability_sum_E, balance, z, entropy)


def add(a: RoutingRecord, b: RoutingRecord) -> RoutingRecord:
    """Return the sum of two records."""
    return RoutingRecord(*(getattr(a, name) + getattr(b, name) for name in RoutingRecord.__dataclass_fields__))


def detached(record: RoutingRecord) -> RoutingRecord:
    """Return a record without gradients."""
    return RoutingRecord(*(getattr(record, name).detach() for name in RoutingRecord.__dataclass_fields__))


def layer_figures(record: RoutingRecord, tokens: int) -> dict[str, object]:
    """Return what is recorded of one layer.

    ``load``: share of assignments per expert, before drops. ``max_violation``: fullest expert over the mean, minus one
    (arXiv 2408.15664, eq. 4). ``entropy``: of the router's probabilities, mean over tokens, in nats.
    """
    counts_E = record.counts_E
    assignments = counts_E.sum().clamp(min=1)
    load_E = counts_E / assignments
    return {
        "load": load_E.tolist(),
        "dropped_fraction": (record.dropped / assignments).item(),
        "max_violation": (load_E.max() * counts_E.numel() - 1).item(),
        "entropy": record.entropy_sum.item() / tokens,
        "dead_experts": int((counts_E == 0).sum()),
    }
