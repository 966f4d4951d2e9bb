"""The slow, obvious truth: the whole model on the whole global batch in one process, token by token, expert by expert.

It shares only parameter values and the configuration with the product: no attention, rotary table, activation, layer
pattern, router, random number, capacity plan, exchange, permutation, grouped product, balance sum, gradient buffer,
schedule, fused optimizer or loss of its own. Its parts are `oracle_model`, `oracle_networks`, `oracle_attention`,
`oracle_heads`, `oracle_depth`, `oracle_graph`, `oracle_classifier`, `oracle_tokens`, `oracle_routers`,
`oracle_capacity` and `oracle_balance`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import oracle_balance as balance
import torch
from oracle_model import BOUNDARY, IGNORE, Batch, Split, Texts, classify, forward
from oracle_tokens import derived
from torch import Tensor

from moe_train.config.schema import TrainConfig
from moe_train.models.transformer import Transformer

__all__ = ["BOUNDARY", "IGNORE", "Split", "Truth", "train"]
WHOLE = Split()
VECTORS = re.compile(
    r"bias_LM$|norm\.weight$|\.bias$|_bias_|sinks_H$|logits_E$|query_D$|adjacency\.logits_EE$|\.weight_D$"
)
"""Names of parameters that do not decay: gains of norms, biases of every kind, sinks, weights and queries of a pooling;
scores of tokens; and logits of edges, whose natural rest is no edge, not half of one."""


@dataclass
class Truth:
    """Figures of a few optimizer steps.

    Attributes:
        figures: per step, what a record of the step says.
        norms: per step, the gradient norm before clipping.
        gradients: of the last step, clipped.
        weights: after the last step.
        biases: and thresholds of the routers after the last step, by name.
    """

    figures: list[dict[str, object]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


def target(labels: list[int], position: int, later: int) -> int | None:
    """What is to be predicted: the next token, or one ``later`` in the same document."""
    if position + later >= len(labels) or BOUNDARY in labels[position : position + later]:
        return None
    label = labels[position + later]
    return None if label == IGNORE else label


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, later: int) -> tuple[Tensor, int]:
    """Summed over the targets, and their number."""
    total, number = torch.zeros((), dtype=logits_BSV.dtype), 0
    for logits_SV, labels in zip(logits_BSV, labels_BS.tolist(), strict=True):
        for position, logits_V in enumerate(logits_SV.unbind()):
            label = target(labels, position, later)
            if label is not None:
                total = total + logits_V.logsumexp(0) - logits_V[label]
                number += 1
    return total, number


def objective(config: TrainConfig, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Batch, done: float):
    """The whole objective after a share ``done`` of the training, the figures of the step, and the expert layers."""
    ffn, mtp = config.model.ffn, config.model.mtp
    if config.model.classifier is not None:
        return class_objective(config, w, biases, batch)
    (logits_BSV, *ahead), layers = forward(config.model, w, biases, batch)
    loss, number = cross_entropy(logits_BSV, batch.labels_BS, 0)
    total = loss / number
    figures: dict[str, object] = {"loss": total.item()}
    module_weight = (mtp.late_coef if done >= mtp.late_after else mtp.coef) / max(1, mtp.depth)
    if ahead:
        sums = [cross_entropy(logits, batch.labels_BS, k + 1) for k, logits in enumerate(ahead)]
        figures["mtp_loss"] = sum(value.item() for value, _ in sums) / sum(targets for _, targets in sums)
        total = total + module_weight * sum(value for value, _ in sums) / number
    values: dict[str, list[float]] = {}
    for place, layer in layers.items():
        for name, (coefficient, value) in layer.losses(ffn).items():
            weight = coefficient if place.depth < config.model.layers else coefficient * module_weight
            total = total + weight * value * layer.num_tokens / number  # those of a module are fewer
            values.setdefault(name, []).append(value.item())
        for name, value in layer.figures(ffn).items():
            figures[f"moe/{place.name}/{name}"] = value
    figures |= {name: sum(found) / len(found) for name, found in values.items()}
    return total, figures, layers


def class_objective(config: TrainConfig, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Texts):
    """The same of a classifier: a text has one target, a layer weighs by its mean over tokens, or over texts."""
    logits, layers = classify(config.model, w, biases, batch)
    classes, values = batch.classes, {}
    loss = sum(logits_C.logsumexp(0) - logits_C[classes[b]] for b, logits_C in logits.items()) / len(classes)
    total, figures = loss, {"loss": loss.item()}
    for place, layer in layers.items():
        for name, (coefficient, value) in layer.losses(config.model.ffn).items():
            # By the tokens before some are left out, which the step knows beforehand.
            of = len(classes) if place.part == "head" else int(batch.valid_BS.sum())
            total = total + coefficient * value * layer.num_tokens / of
            values.setdefault(name, []).append(value.item())
        for name, value in layer.figures(config.model.ffn).items():
            figures[f"moe/{place.name}/{name}"] = value
    figures |= {name: sum(found) / len(found) for name, found in values.items()}
    return total, figures, layers


class AdamW:
    """Plain AdamW of named tensors."""

    def __init__(self, w: dict[str, Tensor], config) -> None:
        self.config, self.steps = config, 0
        self.first, self.second = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))

    @torch.no_grad()
    def step(self, w: dict[str, Tensor], gradients: dict[str, Tensor], rate: float) -> None:
        self.steps += 1
        beta1, beta2 = self.config.betas
        for n, p in w.items():
            g = gradients[n]
            self.first[n] = beta1 * self.first[n] + (1 - beta1) * g
            self.second[n] = beta2 * self.second[n] + (1 - beta2) * g * g
            p -= 0.0 if VECTORS.search(n) else rate * self.config.weight_decay * p
            root = (self.second[n] / (1 - beta2**self.steps)).sqrt()
            p -= rate / (1 - beta1**self.steps) * self.first[n] / (root + self.config.eps)


def move_biases(config: TrainConfig, biases: dict[str, list[float]], layers, figures, done: float) -> None:
    """Move them, unless it is too late for that, and report their range."""
    loss_free = config.model.ffn.balance.loss_free
    for place, layer in layers.items():
        name = f"{layer.name}.router.bias_E"
        if name in biases:
            if done < loss_free.freeze_after:
                biases[name] = balance.moved_bias(loss_free, biases[name], layer.decisions)
            figures[f"moe/{place.name}/bias_range"] = max(biases[name]) - min(biases[name])


def move_thresholds(config: TrainConfig, thresholds: dict[str, list[float]], layers) -> None:
    """Move those of experts that take tokens."""
    for layer in layers.values():
        name = f"{layer.name}.router.threshold_E"
        if name in thresholds:
            decay = config.model.ffn.router.decay
            thresholds[name] = balance.moved_threshold(decay, thresholds[name], layer.tokens, layer.decisions)


def train(
    config: TrainConfig,
    model: Transformer,
    batches: list[tuple[Tensor, ...]],
    rates: list[float],
    split: Split = WHOLE,
) -> Truth:
    """Train the parameter values of ``model`` (which holds all experts) for some steps of plain AdamW."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    biases = {
        name: b.tolist()
        for name, b in model.named_buffers()
        if name.endswith(("bias_E", "ratios_NC", "hashes_N", "ratings_N"))
    }
    thresholds = {name: b.tolist() for name, b in model.named_buffers() if name.endswith("threshold_E")}
    truth, optimizer = Truth(), AdamW(w, config.optim)
    for step, ((ids_BS, labels_BS, *valid), rate) in enumerate(zip(batches, rates, strict=True)):
        kind = Texts if valid else Batch
        batch = kind(ids_BS, labels_BS, split, derived(config.run.seed, step), *valid)
        done = step / config.train.steps
        total, figures, layers = objective(config, w, biases, batch, done)
        gradients = dict(zip(w, torch.autograd.grad(total, list(w.values()), allow_unused=True), strict=True))
        gradients = {n: torch.zeros_like(w[n]) if g is None else g for n, g in gradients.items()}
        size = math.sqrt(sum(g.pow(2).sum().item() for g in gradients.values()))
        scale = 1.0 if config.train.clip_norm is None else min(1.0, config.train.clip_norm / (size + 1e-6))
        truth.gradients = {n: g * scale for n, g in gradients.items()}
        optimizer.step(w, truth.gradients, rate)
        move_biases(config, biases, layers, figures, done)
        move_thresholds(config, thresholds, layers)
        for place, layer in layers.items():
            moved = layer.figures_after_step(config.model.ffn, w)
            figures |= {f"moe/{place.name}/{key}": value for key, value in moved.items()}
        truth.figures.append(figures)
        truth.norms.append(size)
    truth.weights = {n: p.detach() for n, p in w.items()}
    truth.biases = {n: torch.tensor(b, dtype=torch.float64) for n, b in (biases | thresholds).items()}
    return truth
