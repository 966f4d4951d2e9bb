"""The sums of one optimizer step, from which its record is made.

Sums stay on the device; they travel over the ranks, and to the host, only for the steps that are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from moe_train.dist.comm import sum_over
from moe_train.dist.mesh import Mesh
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.layer import MoELayer
from moe_train.training.mtp import MTPLoss

Statistics: TypeAlias = tuple[Tensor, ...]
"""Per balance loss of a layer its vector of sums."""


@dataclass
class Tally:
    """Sums over the micro-batches of this rank.

    Attributes:
        layers: the MoE layers by depth.
        loss_sum: summed cross-entropy in nats; None before the first micro-batch.
        records: per MoE layer the sums of its router over the micro-batches, without gradients.
        mtp_sums: [2] fp64, summed cross-entropy of multi-token prediction and its targets; None without modules.
    """

    layers: dict[int, MoELayer]
    loss_sum: Tensor | None = None
    records: list[RoutingRecord] = field(default_factory=list)
    mtp_sums: Tensor | None = None

    def add(self, loss_sum: Tensor, records: tuple[RoutingRecord, ...], mtp: MTPLoss | None = None) -> None:
        """Add one micro-batch."""
        loss_sum = loss_sum.detach().to(torch.float64)
        self.loss_sum = loss_sum if self.loss_sum is None else self.loss_sum + loss_sum
        detached = [record.detached() for record in records]
        self.records = [a + b for a, b in zip(self.records, detached, strict=True)] if self.records else detached
        if mtp is not None and mtp.modules:
            self.mtp_sums = mtp.sums if self.mtp_sums is None else self.mtp_sums + mtp.sums

    def measure(self, tokens: int, mesh: Mesh) -> dict[str, object]:
        """Sum over the ranks and return the step's figures. Collective; waits for the device.

        Args:
            tokens: valid tokens of the step over all ranks.
            mesh: the groups.

        Returns:
            ``loss``, ``mtp_loss`` of multi-token prediction (in nats per token that a module predicted), and the
            balance losses by name (means over the MoE layers, unweighted); per MoE layer the figures of
            `layer_figures`.
        """
        assert self.loss_sum is not None, "a step has at least one micro-batch"
        first = [self.loss_sum] if self.mtp_sums is None else [self.loss_sum, self.mtp_sums]
        tensors = [*first, *(tensor for record in self.records for tensor in record.tensors())]
        totals = unpack(sum_over(pack(tensors), mesh.world).cpu(), tensors)
        figures: dict[str, object] = {"loss": totals[0].item() / tokens}
        if self.mtp_sums is not None:
            mtp_sum, targets = totals[1].tolist()
            figures["mtp_loss"] = mtp_sum / max(1.0, targets)
        totals = totals[len(first) :]
        losses: dict[str, list[float]] = {}
        for (depth, layer), local in zip(self.layers.items(), self.records, strict=True):
            size = len(local.tensors())
            record, totals = RoutingRecord.from_tensors(totals[:size]), totals[size:]
            for name, value in layer.balance.values(record.statistics).items():
                losses.setdefault(name, []).append(value.item() / max(1.0, record.tokens.item()))
            found = layer_figures(record, layer.router.bias_E)
            figures |= {f"moe/layer_{depth:02d}/{key}": value for key, value in found.items()}
        return figures | {name: sum(values) / len(values) for name, values in losses.items()}


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one fp64 vector, which is exact for counts below 2^53."""
    return torch.cat([tensor.detach().to(torch.float64).view(-1) for tensor in tensors])


def unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the fp64 tensors of a vector made by `pack`, in the shapes of ``like``."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def total_statistics(records: Sequence[RoutingRecord], mesh: Mesh) -> list[Statistics]:
    """Return each MoE layer's statistics over all ranks: one collective for all layers and losses."""
    if not records:
        return []
    local = [statistic for record in records for statistic in record.statistics]
    totals = unpack(sum_over(pack(local), mesh.world), local)
    num_losses = len(records[0].statistics)
    return [tuple(totals[start : start + num_losses]) for start in range(0, len(totals), num_losses)]


def layer_figures(record: RoutingRecord, bias_E: Tensor | None) -> dict[str, object]:
    """Return what is recorded of one layer.

    ``load``: share of assignments per expert, before drops. ``dropped_fraction``: share that no expert computed, and by
    cause: no room at the expert, over a device's budget, given up by the router. ``rerouted_fraction``: share that went
    to another expert for want of room. ``max_violation``: fullest expert over the mean, minus one (arXiv 2408.15664,
    eq. 4). ``entropy``: of the router's probabilities, mean over tokens, in nats. ``bias_range``: largest minus least
    bias of loss-free balancing, after the step.
    """
    counts_E = record.counts_E
    assignments = counts_E.sum().clamp(min=1)
    load_E = counts_E / assignments
    by_cause = [record.dropped_capacity, record.dropped_device, record.dropped_router]
    capacity, device, router = ((dropped / assignments).item() for dropped in by_cause)
    figures: dict[str, object] = {
        "load": load_E.tolist(),
        "dropped_fraction": capacity + device + router,
        "dropped_capacity_fraction": capacity,
        "dropped_device_fraction": device,
        "dropped_router_fraction": router,
        "rerouted_fraction": (record.rerouted / assignments).item(),
        "max_violation": (load_E.max() * counts_E.numel() - 1).item(),
        "entropy": (record.entropy_sum / record.tokens.clamp(min=1)).item(),
        "dead_experts": int((counts_E == 0).sum()),
    }
    if bias_E is not None:
        figures["bias_range"] = (bias_E.max() - bias_E.min()).item()
    return figures
