"""What the study of classifiers takes from each of its runs, and from the runs of one variant together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.observe.classes import UTILISATION
from moe_train.observe.records import ROUTED, finite, moe_layers
from moe_train.observe.report.record import RunRecord
from moe_train.observe.study.outcome import Spread, read_finished

FIGURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "majority": "largest class",
    "specialisation": "SI",
    "least_used": "least used expert",
    "load_balance_variance": "LBV",
}
"""What is compared: names, with their headings."""


@dataclass(frozen=True)
class Judged:
    """One finished run of the study.

    Attributes:
        variant: set of texts, model and whether its experts are kept even.
        figures: of the final evaluation by the keys of FIGURES; one that no layer had is missing.
        parameters: of the model.
    """

    variant: str
    figures: dict[str, float]
    parameters: int


@dataclass(frozen=True)
class Line:
    """The runs of one variant, one per seed.

    Attributes:
        runs: at least one.
    """

    runs: tuple[Judged, ...]

    @property
    def variant(self) -> str:
        """What its runs have in common."""
        return self.runs[0].variant

    def spread(self, figure: str) -> Spread | None:
        """Return one of FIGURES over the runs, or None when none has it."""
        values = tuple(run.figures[figure] for run in self.runs if figure in run.figures)
        return Spread(values) if values else None


def read_judged(run_dir: Path) -> Judged | None:
    """Return what the run in ``run_dir`` came to, or None when it is not finished or tells no classes."""
    finished = read_finished(run_dir)
    if finished is None or finite(finished.run.evals[-1].get("accuracy")) is None:
        return None
    return Judged(finished.variant, final_figures(finished.run), finished.told("parameters"))


def final_figures(run: RunRecord) -> dict[str, float]:
    """Return the figures of the last evaluation; of layers their mean, of the least used expert the least of all."""
    last = run.evals[-1]
    layers = moe_layers(last, UTILISATION)
    shares = [share for layer in layers for share in map(finite, last.get(f"moe/{layer}/{ROUTED}") or [])]
    found = {name: finite(last.get(name)) for name in ("accuracy", "macro_f1", "majority")}
    for name in ("specialisation", "load_balance_variance"):
        known = [value for layer in layers if (value := finite(last.get(f"moe/{layer}/{name}"))) is not None]
        found[name] = statistics.mean(known) if known else None
    found["least_used"] = min((share for share in shares if share is not None), default=None)
    return {name: value for name, value in found.items() if value is not None}


def group(judged: Sequence[Judged]) -> list[Line]:
    """Return the variants by name: what differs in one thing stands together."""
    variants = sorted({run.variant for run in judged})
    return [Line(tuple(run for run in judged if run.variant == variant)) for variant in variants]
