"""One optimizer step: exact on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.data.loader import Batch
from moe_train.dist.comm import sum_over
from moe_train.dist.mesh import Mesh
from moe_train.models.transformer import ModelOutput, Transformer
from moe_train.ops.loss import IGNORE, cross_entropy_sum
from moe_train.parallel.engine import Engine
from moe_train.training.tally import Tally


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    Attributes:
        grad_norm: gradient norm before clipping, scalar, equal on every rank.
        tally: the sums of this rank.
    """

    grad_norm: Tensor
    tally: Tally


def train_step(
    engine: Engine,
    mesh: Mesh,
    batches: Sequence[Batch],
    tokens: int,
    learning_rate: float,
    clip_norm: float | None,
) -> StepResult:
    """Run the micro-batches of one optimizer step and update.

    Args:
        engine: model and optimizer.
        mesh: the groups.
        batches: this rank's micro-batches; every rank has the same number.
        tokens: valid tokens of the step over all ranks and micro-batches, by which every gradient is divided once.
        learning_rate: of this step.
        clip_norm: largest gradient norm, or None.
    """
    model = engine.model
    tally = Tally(model.moe_layers)
    engine.zero_grad()
    counts = step_counts(model, mesh, batches)
    for batch in batches:
        inputs = to_inputs(batch, model)
        output: ModelOutput = model(inputs.tokens_BS, inputs.valid_BS)
        loss_sum = cross_entropy_sum(output.logits_BSV.flatten(0, 1), inputs.labels_T)
        balance_sum = balance_loss_sum(model, output, counts if counts else global_counts(output, mesh))
        engine.backward((loss_sum + balance_sum) / tokens)
        tally.add(loss_sum, output.records)
    return StepResult(engine.step(learning_rate, clip_norm), tally)


@dataclass(frozen=True)
class Inputs:
    """One micro-batch where the model is.

    Attributes:
        tokens_BS: [B, S] int64.
        labels_T: [B · S] int64, IGNORE where there is no target.
        valid_BS: [B, S] bool, False for padding; None when there is none.
    """

    tokens_BS: Tensor
    labels_T: Tensor
    valid_BS: Tensor | None


def to_inputs(batch: Batch, model: Transformer) -> Inputs:
    """Bring a batch to the model's device; positions without a label are padding."""
    device = model.embedding_VD.device
    valid_BS = batch.labels_BS != IGNORE
    all_valid = bool(valid_BS.all())  # on the host, where batches are made: nothing waits for the device
    return Inputs(
        tokens_BS=batch.tokens_BS.to(device, non_blocking=True),
        labels_T=batch.labels_BS.flatten().to(device, non_blocking=True),
        valid_BS=None if all_valid else valid_BS.to(device, non_blocking=True),
    )


def global_counts(output: ModelOutput, mesh: Mesh) -> list[Tensor]:
    """Return each MoE layer's assignments [E] over all ranks: one collective for all layers."""
    if not output.records:
        return []
    return list(sum_over(torch.stack([record.counts_E for record in output.records]), mesh.world))


def step_counts(model: Transformer, mesh: Mesh, batches: Sequence[Batch]) -> list[Tensor]:
    """Return each MoE layer's assignments over the whole step when a loss needs them before its first backward.

    The global load-balance loss multiplies each micro-batch's probabilities with the load of all of them. To be exact
    under accumulation the load must be known first, so that the routers run twice; without accumulation, or with
    ``aux.scope=sequence``, nothing is run here and the list is empty.
    """
    needed = any(layer.balance.needs_global_counts for layer in model.moe_layers.values())
    if not needed or len(batches) == 1:
        return []
    tally = Tally(model.moe_layers)
    with torch.no_grad():
        for batch in batches:
            inputs = to_inputs(batch, model)
            tally.add(torch.zeros(()), model(inputs.tokens_BS, inputs.valid_BS).records)
    return list(sum_over(torch.stack([record.counts_E for record in tally.records]), mesh.world))


def balance_loss_sum(model: Transformer, output: ModelOutput, counts: list[Tensor]) -> Tensor:
    """Return the weighted balance losses of one micro-batch, summed over layers and tokens."""
    total = output.logits_BSV.new_zeros((), dtype=torch.promote_types(model.dtype, torch.float32))
    for layer, record, counts_E in zip(model.moe_layers.values(), output.records, counts, strict=True):
        total = total + layer.balance.loss_sum(record, counts_E)
    return total
