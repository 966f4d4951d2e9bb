"""What the graph study takes from its runs, and which of them are compared."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moe_train.config.model import ModelConfig
from moe_train.models.counts import count
from moe_train.observe.records import finite
from moe_train.observe.report.record import RunRecord
from moe_train.observe.study.outcome import Finished, Spread, late_mean, read_finished

KINDS = ("graph", "silent", "dense", "sparse")
"""Coupled experts; the same without messages; equal FLOPs without experts; equal parameters, chosen by tokens."""
BY_EXPERTS, BY_LAYERS = {2: "e2", 4: "e4", 8: "e8"}, {0: "l0", 1: "l1", 2: "e4", 3: "l3"}
"""Sizes at which the kinds are compared: numbers of experts (with 2 graph layers), of graph layers (with 4 experts)."""
SIZES = ("e2", "e4", "e8", "l0", "l1", "l3")
BASE = "e4"
"""The size of which the other variants change one thing."""
COMPARED = re.compile(rf"(?P<kind>{'|'.join(KINDS)})_(?P<size>{'|'.join(SIZES)})")


@dataclass(frozen=True)
class GraphOutcome:
    """One finished run of the graph study.

    Attributes:
        variant: what it differs in.
        seed: of its initial values and its data order.
        loss: held-out, nats per token.
        tokens: tokens it was trained on.
        parameters: of the model.
        training_flops: per token, forward and backward; None when its configuration cannot be read.
        tokens_per_s: median over the train records but the first, which also holds the start; None without one.
        similarity: mean cosine between what two experts add, in the last quarter of the run; None without graph layers.
        message_norm: norm of what an expert receives relative to what it sends, likewise; None without messages.
    """

    variant: str
    seed: int
    loss: float
    tokens: int
    parameters: int
    training_flops: float | None
    tokens_per_s: float | None
    similarity: float | None
    message_norm: float | None


@dataclass(frozen=True)
class Comparison:
    """All runs of the study, by variant and seed; of two with the same the later one counts.

    Attributes:
        runs: finished ones.
    """

    runs: tuple[GraphOutcome, ...]

    def of(self, variant: str) -> dict[int, GraphOutcome]:
        """Return the runs of a variant by seed; empty when there are none."""
        return {run.seed: run for run in self.runs if run.variant == variant}

    @property
    def compared(self) -> list[str]:
        """Variants of the four kinds, by size, then kind."""
        names = [f"{kind}_{size}" for size in SIZES for kind in KINDS]
        return [name for name in names if self.of(name)]

    @property
    def others(self) -> list[str]:
        """Variants that differ from the base in one thing, by mean held-out loss."""
        names = {run.variant for run in self.runs if COMPARED.fullmatch(run.variant) is None}
        return sorted(names, key=lambda name: (self.losses(name).mean, name))

    def losses(self, variant: str) -> Spread:
        """Return the held-out losses of a variant, which must have runs."""
        return Spread(tuple(run.loss for _, run in sorted(self.of(variant).items())))

    def difference(self, variant: str, other: str) -> Spread | None:
        """Return loss of ``variant`` minus loss of ``other``, seed by seed, or None when they share no seed."""
        return self.paired(variant, other, lambda run, reference: run.loss - reference.loss)

    def speed(self, variant: str) -> Spread | None:
        """Return tokens per second relative to the dense model of equal FLOPs, seed by seed, or None without both.

        Variants of the base are seen relative to the base's dense model, whatever their own FLOPs.
        """
        named = COMPARED.fullmatch(variant)
        return self.paired(variant, f"dense_{named['size'] if named else BASE}", speed_ratio)

    def paired(
        self, variant: str, other: str, compare: Callable[[GraphOutcome, GraphOutcome], float | None]
    ) -> Spread | None:
        """Return what ``compare`` says of two variants seed by seed, or None when there is nothing."""
        runs, references = self.of(variant), self.of(other)
        found = [compare(runs[seed], references[seed]) for seed in sorted(runs.keys() & references.keys())]
        values = tuple(value for value in found if value is not None)
        return Spread(values) if values else None


def speed_ratio(run: GraphOutcome, reference: GraphOutcome) -> float | None:
    """Return the ratio of two runs' tokens per second, or None when one is unknown."""
    return run.tokens_per_s / reference.tokens_per_s if run.tokens_per_s and reference.tokens_per_s else None


def read_graph_outcome(run_dir: Path) -> GraphOutcome | None:
    """Return what the run in ``run_dir`` came to, or None when it is not finished or no run of a study."""
    finished = read_finished(run_dir)
    if finished is None:
        return None
    return GraphOutcome(
        variant=finished.variant,
        seed=finished.seed,
        loss=finished.loss,
        tokens=finished.tokens,
        parameters=finished.told("parameters"),
        training_flops=training_flops(finished),
        tokens_per_s=usual_speed(finished.run),
        similarity=late_mean(finished.run, "similarity"),
        message_norm=late_mean(finished.run, "message_norm"),
    )


def usual_speed(run: RunRecord) -> float | None:
    """Return the median tokens per second over the train records but the first."""
    values = [speed for record in run.train[1:] if (speed := finite(record.get("tokens_per_s"))) is not None]
    return statistics.median(values) if values else None


def training_flops(finished: Finished) -> float | None:
    """Return the FLOPs per token, forward and backward, of the configuration that the run saved."""
    seq_len = finished.run.setting("data.seq_len")
    try:
        config = ModelConfig.model_validate(finished.run.setting("model"))
    except ValidationError:
        return None
    if not isinstance(seq_len, int):
        return None
    vocab_size = vocabulary_of(config, finished.told("parameters"))
    return count(config, vocab_size, seq_len).training_flops_per_token


def vocabulary_of(config: ModelConfig, parameters: int) -> int:
    """Return the tokens of the tokenizer that a model with so many parameters was built for; 1 where it plays no role.

    A small corpus gives a tokenizer fewer tokens than were asked for, and a run does not tell how many.
    """
    first, second = (count(config, vocab_size, seq_len=1).total for vocab_size in (1, 2))
    return 1 + (parameters - first) // (second - first) if second > first else 1
