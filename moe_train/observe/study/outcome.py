"""What a study takes from each of its runs, and from the runs of one variant together."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.observe.finished import final_loss
from moe_train.observe.records import finite
from moe_train.observe.report.record import RunRecord

FIGURES = {
    "loss": "held-out loss",
    "max_violation": "max violation",
    "dropped_fraction": "dropped",
    "entropy": "entropy",
}
"""What is compared: names of the records' keys, with their headings."""
# routing_study-study_gshard-seed_1 from a sweep, routing_study-gshard-seed_1 from a user's hand.
NAME = re.compile(r"(?:.*-)?(?:study_)?(?P<variant>[^-]+)-seed_(?P<seed>\d+)")
FAMILIES = ("", "balance_", "capacity_")
"""Beginnings of variants' names, in the order of the table; those of routers have none."""


@dataclass(frozen=True)
class Finished:
    """A run of a study that has its final evaluation.

    Attributes:
        run: what its folder holds.
        variant: what it differs in, from its name.
        seed: from its name.
        loss: of the final evaluation, nats per token.
    """

    run: RunRecord
    variant: str
    seed: int
    loss: float

    @property
    def tokens(self) -> int:
        """Tokens it was trained on."""
        return int(self.run.train[-1].get("tokens") or 0)

    def told(self, size: str) -> int:
        """Return ``parameters`` or ``active_parameters`` of the model, as the run told them at its start."""
        started = next((event for event in self.run.events if size in event), {})
        return int(started.get(size) or 0)


@dataclass(frozen=True)
class Outcome:
    """One finished run of the routing study.

    Attributes:
        variant: what it differs in.
        figures: by the keys of FIGURES; one that no record held is missing.
        tokens: tokens it was trained on.
        parameters: of the model.
        active_parameters: those that a token uses.
        sees_future: its router lets later tokens decide, also in evaluation: the loss is too good.
    """

    variant: str
    figures: dict[str, float]
    tokens: int
    parameters: int
    active_parameters: int
    sees_future: bool


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds.

    Attributes:
        values: one per run that has it.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (sample, n - 1), or None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Variant:
    """The runs of one variant, one per seed.

    Attributes:
        runs: at least one.
    """

    runs: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """What its runs have in common."""
        return self.runs[0].variant

    @property
    def family(self) -> int:
        """Index in FAMILIES."""
        return max(index for index, beginning in enumerate(FAMILIES) if self.name.startswith(beginning))

    def spread(self, figure: str) -> Spread | None:
        """Return one of FIGURES over the runs, or None when none has it."""
        values = tuple(run.figures[figure] for run in self.runs if figure in run.figures)
        return Spread(values) if values else None


def read_finished(run_dir: Path) -> Finished | None:
    """Return the run in ``run_dir``, or None when it is not finished or no run of a study."""
    run = RunRecord.load(run_dir)
    named = NAME.fullmatch(run.name)
    loss = final_loss(run)
    if named is None or loss is None:
        return None
    return Finished(run, named["variant"], int(named["seed"]), loss)


def read_outcome(run_dir: Path) -> Outcome | None:
    """Return what the run in ``run_dir`` came to, or None when it is not finished or no run of a study."""
    finished = read_finished(run_dir)
    if finished is None:
        return None
    found = {name: late_mean(finished.run, name) for name in FIGURES if name != "loss"}
    return Outcome(
        variant=finished.variant,
        figures={"loss": finished.loss, **{name: value for name, value in found.items() if value is not None}},
        tokens=finished.tokens,
        parameters=finished.told("parameters"),
        active_parameters=finished.told("active_parameters"),
        sees_future=saw_later_tokens(finished.run),
    )


def saw_later_tokens(run: RunRecord) -> bool:
    """Whether experts took tokens with knowledge of later ones where the loss was measured.

    So it was in runs before thresholds were learnt; since then the loss is causal, and the other one stands beside it.
    """
    takes = run.setting("model.ffn.router.kind") == "expert_choice"
    return takes and "loss_looking_ahead" not in run.evals[-1]


def late_mean(run: RunRecord, name: str) -> float | None:
    """Return the mean of ``moe/<layer>/<name>`` over layers and over the train records of the last quarter of the run.

    One record alone would tell of its batch; the first three quarters tell of the beginning. Of a figure that is a list
    (one value per graph layer) every value counts.
    """
    late = [record for record in run.train if record["step"] > 0.75 * run.train[-1]["step"]]
    told = (record.get(f"moe/{layer}/{name}") for record in late for layer in run.layers)
    found = (finite(value) for values in told for value in (values if isinstance(values, list) else [values]))
    values = [value for value in found if value is not None]
    return statistics.mean(values) if values else None


def group(outcomes: Sequence[Outcome]) -> list[Variant]:
    """Return the variants by family, in each by mean held-out loss."""
    runs: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.variant, []).append(outcome)
    variants = [Variant(tuple(found)) for found in runs.values()]
    return sorted(variants, key=lambda v: (v.family, statistics.mean(run.figures["loss"] for run in v.runs), v.name))
