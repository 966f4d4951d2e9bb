"""The sums of one optimizer step, from which its record is made.

Sums stay on the device; they travel over the ranks, and to the host, only for the steps that are recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from moe_train.dist.comm import sum_over
from moe_train.dist.mesh import Mesh
from moe_train.moe.record import ExpertLayer, LayerKey, LayerRecord
from moe_train.training.mtp import MTPLoss

Statistics: TypeAlias = tuple[Tensor, ...]
"""Per balance loss of a layer its vector of sums."""


@dataclass
class Tally:
    """Sums over the micro-batches of this rank.

    Attributes:
        layers: what leaves records, in their order.
        loss_sum: summed cross-entropy in nats; None before the first micro-batch.
        records: of each layer the sums over the micro-batches, without gradients.
        mtp_sums: [2] fp64, summed cross-entropy of multi-token prediction and its targets; None without modules.
    """

    layers: dict[LayerKey, ExpertLayer]
    loss_sum: Tensor | None = None
    records: list[LayerRecord] = field(default_factory=list)
    mtp_sums: Tensor | None = None

    def add(self, loss_sum: Tensor, records: tuple[LayerRecord, ...], mtp: MTPLoss | None = None) -> None:
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
            layers' losses by name (means over the layers with experts, unweighted); per layer its figures.
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
        for (key, layer), local in zip(self.layers.items(), self.records, strict=True):
            size = len(local.tensors())
            record, totals = local.from_tensors(totals[:size]), totals[size:]
            for name, value in layer.balance.values(record.statistics).items():
                losses.setdefault(name, []).append(value.item() / max(1.0, record.tokens.item()))
            found = record.figures() | layer.figures()
            figures |= {f"moe/{key.name}/{figure}": value for figure, value in found.items()}
        return figures | {name: sum(values) / len(values) for name, values in losses.items()}


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one fp64 vector, which is exact for counts below 2^53."""
    return torch.cat([tensor.detach().to(torch.float64).view(-1) for tensor in tensors])


def unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the fp64 tensors of a vector made by `pack`, in the shapes of ``like``."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def total_statistics(records: Sequence[LayerRecord], mesh: Mesh) -> list[Statistics]:
    """Return the statistics of each layer with a record over all ranks: one collective for all layers and losses."""
    if not records:
        return []
    local = [statistic for record in records for statistic in record.statistics]
    totals = unpack(sum_over(pack(local), mesh.world), local)
    rest = iter(totals)
    return [tuple(itertools.islice(rest, len(record.statistics))) for record in records]
