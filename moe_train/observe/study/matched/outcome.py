"""What a matched study takes from each of its runs, and how runs of one seed are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_train.observe.records import finite
from moe_train.observe.report.record import RunRecord
from moe_train.observe.study.graph.outcome import training_flops, usual_speed
from moe_train.observe.study.matched.plan import SEEDS, Plan
from moe_train.observe.study.outcome import Spread, read_finished


@dataclass(frozen=True)
class MatchedOutcome:
    """One finished run of a matched study.

    Attributes:
        variant: what it differs in.
        seed: of its initial values and its data order.
        loss: held-out, nats per token, no choice knowing later tokens.
        loss_looking_ahead: the same with the choices of training; None where these know no later tokens.
        tokens: tokens it was trained on.
        parameters: of the model.
        flops_per_token: of training, forward and backward; None when its configuration cannot be read.
        tokens_per_s: in training, median over the train records but the first; None without one.
        causal_accuracy: share of tokens about which the choice without later tokens is right, in the last quarter of
            the run, mean over blocks; None where all tokens pass.
    """

    variant: str
    seed: int
    loss: float
    loss_looking_ahead: float | None
    tokens: int
    parameters: int
    flops_per_token: float | None
    tokens_per_s: float | None
    causal_accuracy: float | None

    @property
    def training_flops(self) -> float | None:
        """Of the whole run."""
        return None if self.flops_per_token is None else self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Comparison:
    """All runs of a study, by variant and seed; of two with the same the later one counts.

    Attributes:
        plan: what is compared with what.
        runs: finished ones.
    """

    plan: Plan
    runs: tuple[MatchedOutcome, ...]

    def of(self, variant: str) -> dict[int, MatchedOutcome]:
        """Return the runs of a variant by seed, ascending; empty when there are none."""
        return {run.seed: run for run in sorted(self.runs, key=lambda run: run.seed) if run.variant == variant}

    @property
    def variants(self) -> list[str]:
        """Those with runs: the plan's in its order, then others by name."""
        others = {run.variant for run in self.runs} - set(self.plan.variants)
        return [variant for variant in (*self.plan.variants, *sorted(others)) if self.of(variant)]

    @property
    def missing(self) -> dict[str, list[int]]:
        """The seeds of each of the plan's variants that no finished run has."""
        found = {variant: [seed for seed in SEEDS if seed not in self.of(variant)] for variant in self.plan.variants}
        return {variant: seeds for variant, seeds in found.items() if seeds}

    def spread(self, variant: str, figure: Callable[[MatchedOutcome], float | None]) -> Spread | None:
        """Return a figure over the seeds that have it, or None when none has."""
        values = tuple(value for run in self.of(variant).values() if (value := figure(run)) is not None)
        return Spread(values) if values else None

    def difference(self, variant: str) -> Spread | None:
        """Return the loss minus that of the group's reference, seed by seed, or None when they share no seed."""
        return self.paired(variant, lambda run, reference: run.loss - reference.loss)

    def speed(self, variant: str) -> Spread | None:
        """Return tokens per second relative to the group's reference, seed by seed, or None without both."""
        return self.paired(variant, speed_ratio)

    def paired(self, variant: str, compare: Callable[[MatchedOutcome, MatchedOutcome], float | None]) -> Spread | None:
        """Return what ``compare`` says of a variant and its reference seed by seed; None of nothing, or of itself."""
        group = self.plan.group_of(variant)
        if group is None or group.reference == variant:
            return None
        runs, references = self.of(variant), self.of(group.reference)
        found = [compare(runs[seed], references[seed]) for seed in runs if seed in references]
        values = tuple(value for value in found if value is not None)
        return Spread(values) if values else None


def speed_ratio(run: MatchedOutcome, reference: MatchedOutcome) -> float | None:
    """Return the ratio of two runs' tokens per second, or None when one is unknown."""
    return run.tokens_per_s / reference.tokens_per_s if run.tokens_per_s and reference.tokens_per_s else None


def read_matched_outcome(run_dir: Path) -> MatchedOutcome | None:
    """Return what the run in ``run_dir`` came to, or None when it is not finished or no run of a study."""
    finished = read_finished(run_dir)
    if finished is None:
        return None
    return MatchedOutcome(
        variant=finished.variant,
        seed=finished.seed,
        loss=finished.loss,
        loss_looking_ahead=finite(finished.run.evals[-1].get("loss_looking_ahead")),
        tokens=finished.tokens,
        parameters=finished.told("parameters"),
        flops_per_token=training_flops(finished),
        tokens_per_s=usual_speed(finished.run),
        causal_accuracy=late_accuracy(finished.run),
    )


def late_accuracy(run: RunRecord) -> float | None:
    """Return the mean of ``causal_accuracy`` over blocks and over the train records of the last quarter of the run."""
    late = [record for record in run.train if record["step"] > 0.75 * run.train[-1]["step"]]
    told = (finite(record.get(f"moe/{layer}/causal_accuracy")) for record in late for layer in run.depth_layers)
    values = [value for value in told if value is not None]
    return statistics.mean(values) if values else None
