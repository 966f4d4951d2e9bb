"""One optimizer step: exact on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.data.loader import Batch
from moe_train.dist.comm import sum_over
from moe_train.dist.mesh import Mesh
from moe_train.dist.peers import Together
from moe_train.models.classifier import PART
from moe_train.models.transformer import ModelLosses, Transformer
from moe_train.moe.balance import RoutingRecord, TakingRecord
from moe_train.moe.context import RoutingContext
from moe_train.moe.layer import MoELayer
from moe_train.moe.routers.expert_choice import ExpertChoiceRouter
from moe_train.ops.loss import IGNORE
from moe_train.parallel.engine import Engine
from moe_train.parallel.shard import device_of
from moe_train.training.mtp import mtp_labels, mtp_loss
from moe_train.training.tally import Statistics, Tally, total_statistics


@dataclass(frozen=True)
class StepSettings:
    """What may differ from step to step, equal on every rank.

    Attributes:
        learning_rate: of this step.
        clip_norm: largest gradient norm, or None.
        seed: of what routers draw in this step.
        mtp_coef: weight of the mean loss of the modules of multi-token prediction.
        moves_biases: whether loss-free balancing still moves its biases.
        boundary_id: token that ends a document; no module predicts beyond it. None: one document without end.
    """

    learning_rate: float
    clip_norm: float | None
    seed: int
    mtp_coef: float = 0.0
    moves_biases: bool = True
    boundary_id: int | None = None


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
    targets: int,
    settings: StepSettings,
    valid_tokens: int | None = None,
) -> StepResult:
    """Run the micro-batches of one optimizer step and update.

    Args:
        engine: model and optimizer.
        mesh: the groups.
        batches: this rank's micro-batches; every rank has the same number.
        targets: labels of the step over all ranks and micro-batches, by which every gradient is divided once.
        settings: of this step.
        valid_tokens: tokens of the step, counted alike; None: every one has a label, as in a language model.
    """
    model = engine.model
    tally = Tally(model.expert_layers)
    engine.zero_grad()
    inputs = [to_inputs(batch, model, mesh, settings.seed) for batch in batches]
    targets_per_token = targets / (valid_tokens or targets)
    totals = step_totals(model, mesh, inputs)
    for place, micro_batch in enumerate(inputs):
        later = mtp_labels(micro_batch.labels_BS, model.config.mtp.depth, settings.boundary_id)
        output: ModelLosses = model(micro_batch.tokens_BS, micro_batch.context, [micro_batch.labels_BS, *later])
        loss_sum, mtp = output.loss_sums[0], mtp_loss(output, later)
        balance_totals = totals or pass_totals(model, mesh, output)
        balance_sum = balance_loss_sum(model, output, balance_totals, settings.mtp_coef, targets_per_token)
        loss = (loss_sum + settings.mtp_coef * mtp.mean_sum + balance_sum) / targets
        engine.backward(loss, is_last=place == len(inputs) - 1)
        tally.add(loss_sum, output.records, mtp)
    grad_norm = engine.step(settings.learning_rate, settings.clip_norm)
    if settings.moves_biases:
        move_biases(model, mesh, tally)
    move_thresholds(model, mesh, tally)
    return StepResult(grad_norm, tally)


@dataclass(frozen=True)
class Inputs:
    """One micro-batch where the model is.

    Attributes:
        tokens_BS: [B, S] int64.
        labels_BS: [B, S] int64, IGNORE where there is no target.
        context: what routers know of these tokens.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    context: RoutingContext


def to_inputs(batch: Batch, model: Transformer, mesh: Mesh, seed: int) -> Inputs:
    """Bring a batch to the model's device."""
    device = device_of(model, mesh)
    tokens_BS = batch.tokens_BS.to(device, non_blocking=True)
    labels_BS = batch.labels_BS.to(device, non_blocking=True)
    valid_BS = valid_of(batch)
    all_valid = bool(valid_BS.all())  # on the host, where batches are made: nothing waits for the device
    head = model.config.classifier
    context = RoutingContext(
        ids_BS=tokens_BS,
        sequences_B=torch.arange(tokens_BS.shape[0], device=device) + batch.first_sequence,
        valid_BS=None if all_valid else valid_BS.to(device, non_blocking=True),
        seed=seed,
        peers=Together(mesh.world),
        classes_B=None if head is None else labels_BS.amax(dim=1),
        num_classes=0 if head is None else head.num_classes or 0,
    )
    return Inputs(tokens_BS, labels_BS, context)


def valid_of(batch: Batch) -> Tensor:
    """Return which positions hold tokens, [B, S] bool; without a word of it, those with a label."""
    return batch.labels_BS != IGNORE if batch.valid_BS is None else batch.valid_BS


def step_totals(model: Transformer, mesh: Mesh, inputs: Sequence[Inputs]) -> list[Statistics]:
    """Return each MoE layer's statistics over the whole step when a loss needs them before its first backward.

    The global load-balance loss multiplies each micro-batch's probabilities with the load of all of them. To be exact
    under accumulation the load must be known first, so that the routers run twice (and draw the same numbers twice);
    without accumulation, or with ``scope=sequence``, nothing is run here and the list is empty.
    """
    if len(inputs) == 1 or not any(layer.balance.needs_totals for layer in model.expert_layers.values()):
        return []
    tally = Tally(model.expert_layers)
    with torch.no_grad():
        for micro_batch in inputs:
            tally.add(torch.zeros(()), model(micro_batch.tokens_BS, micro_batch.context, ()).records)
    return total_statistics(tally.records, mesh)


def pass_totals(model: Transformer, mesh: Mesh, output: ModelLosses) -> list[Statistics]:
    """Return each MoE layer's statistics of one forward pass over all ranks, or of this rank if no loss needs more."""
    if any(layer.balance.needs_totals for layer in model.expert_layers.values()):
        return total_statistics(output.records, mesh)
    return [record.statistics for record in output.records]


def balance_loss_sum(
    model: Transformer, output: ModelLosses, totals: list[Statistics], mtp_coef: float, targets_per_token: float
) -> Tensor:
    """Return what adds the gradient of the weighted balance losses of one micro-batch, summed over layers.

    A layer's share is n times its mean over its n tokens, and all is divided by the number of targets: where a text has
    one target, the layers that see its tokens are scaled by ``targets_per_token``, so that they weigh as in a language
    model; the head, which sees texts, needs no scale.
    """
    total = output.loss_sums[0].new_zeros((), dtype=torch.float64)
    for (key, layer), record, statistics in zip(model.expert_layers.items(), output.records, totals, strict=True):
        weight = 1.0 if key.part == PART else targets_per_token * depth_weight(model.config, key.depth, mtp_coef)
        total = total + weight * layer.balance.share(record, statistics)
    return total


def depth_weight(config: ModelConfig, depth: int, mtp_coef: float) -> float:
    """Return the weight of a layer's balance losses by its depth.

    Those of modules of multi-token prediction are weighted as the modules' own loss is: at weight zero the modules
    leave the model alone.
    """
    return 1.0 if depth < config.layers else mtp_coef / config.mtp.depth


@torch.no_grad()
def move_biases(model: Transformer, mesh: Mesh, tally: Tally) -> None:
    """Move the biases of loss-free balancing, once per optimizer step, by the load of all ranks and micro-batches."""
    biased = [
        (layer.router.bias_E, layer.balance, record.choices_E)
        for layer, record in zip(model.expert_layers.values(), tally.records, strict=True)
        if isinstance(layer, MoELayer) and layer.router.bias_E is not None and isinstance(record, RoutingRecord)
    ]
    if not biased:
        return
    counts = sum_over(torch.stack([counts_E for _, _, counts_E in biased]), mesh.world)
    for (bias_E, balance, _), counts_E in zip(biased, counts, strict=True):
        bias_E += balance.bias_change(counts_E).to(bias_E.dtype)


@torch.no_grad()
def move_thresholds(model: Transformer, mesh: Mesh, tally: Tally) -> None:
    """Move the thresholds of experts that take tokens, once per step, by the sequences of all ranks and micro-batches.

    No loss depends on a threshold, and no choice of the training: they are for evaluation and generation.
    """
    taking = [
        (layer.router, torch.stack([record.last_sum_E, record.sequences_E.to(record.last_sum_E.dtype)]))
        for layer, record in zip(model.expert_layers.values(), tally.records, strict=True)
        if isinstance(layer, MoELayer) and isinstance(record, TakingRecord)
    ]
    if not taking:
        return
    totals = sum_over(torch.stack([sums for _, sums in taking]), mesh.world)
    for (router, _), (sum_E, sequences_E) in zip(taking, totals, strict=True):
        assert isinstance(router, ExpertChoiceRouter), "no other router learns from what experts took"
        router.move_threshold(sum_E, sequences_E)
