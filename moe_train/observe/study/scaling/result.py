"""Fitting a law to a study and writing what came out: a page, a picture, the law as JSON, the points as CSV."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_train.observe.files import write_atomically
from moe_train.observe.report.drawing import PNG_DPI, STYLE
from moe_train.observe.study.outcome import Spread
from moe_train.observe.study.scaling.capacity import CapacitySweep, capacity_sweep
from moe_train.observe.study.scaling.fit import RESAMPLES, Fit, Prediction, fit_law, predict, split
from moe_train.observe.study.scaling.frontier import Choice, Frontier
from moe_train.observe.study.scaling.law import FORMULA, Places
from moe_train.observe.study.scaling.points import Point
from moe_train.observe.study.scaling.table import read_points, to_csv


@dataclass(frozen=True)
class ScalingStudy:
    """Everything that a page on a study tells.

    Attributes:
        name: of its folder or file.
        points: all finished runs.
        unfinished: names of the folders that were left out.
        fit: the law.
        frontier: what it says of budgets.
        choices: what each budget is best spent on.
        heldout: runs with the most FLOPs, which the law was not fitted to, with what it says of them.
        capacity: the sweep over capacity factors; None without one.
    """

    name: str
    points: tuple[Point, ...]
    unfinished: tuple[str, ...]
    fit: Fit
    frontier: Frontier
    choices: tuple[Choice, ...]
    heldout: tuple[tuple[Point, Prediction], ...]
    capacity: CapacitySweep | None

    def predicted(self, point: Point) -> float:
        """Return the loss that the law says of a run, in nats per token."""
        return float(self.fit.law.loss(Places.of([point]))[0])

    @property
    def noise(self) -> Spread | None:
        """Relative standard deviations of the losses of runs that differ in the seed alone; None without such."""
        groups: dict[tuple[Any, ...], list[float]] = {}
        for point in self.points:
            key = (point.active_parameters, point.experts, point.top_k, point.tokens, point.capacity_factor)
            groups.setdefault(key, []).append(point.loss)
        repeated = [Spread(tuple(losses)) for losses in groups.values() if len(losses) > 1]
        return Spread(tuple((s.deviation or 0.0) / s.mean for s in repeated)) if repeated else None


def read_study(path: Path, resamples: int = RESAMPLES) -> ScalingStudy:
    """Read the runs of a study and fit the law.

    Args:
        path: folder of run folders, or a points.csv.
        resamples: of the bootstrap.

    Raises:
        DataError: there are no runs, or too few for a law.
    """
    points, unfinished = read_points(path)
    fitted, largest = split(points)
    fit = fit_law(fitted, resamples)
    frontier = Frontier.of(fit)
    return ScalingStudy(
        name=path.resolve().stem,
        points=tuple(points),
        unfinished=tuple(folder.name for folder in unfinished),
        fit=fit,
        frontier=frontier,
        choices=tuple(frontier.choose(budget) for budget in frontier.budgets),
        heldout=tuple((point, predict(fit, point)) for point in largest),
        capacity=capacity_sweep(points),
    )


def write_scaling_report(path: Path, resamples: int = RESAMPLES) -> Path:
    """Fit the law to a study, write ``report/`` into its folder, and return the path of the page.

    Beside the page lie ``scaling.png``, ``law.json`` and ``points.csv``. Of a file ``NAME.csv`` the folder is ``NAME``.

    Raises:
        DataError: there are no runs, or too few for a law.
        OSError: the folder cannot be written.
    """
    import matplotlib

    from moe_train.observe.study.scaling import page, picture

    study = read_study(path, resamples)
    output = (path.with_suffix("") if path.is_file() else path) / "report"
    write_atomically(output / "points.csv", to_csv(study.points))
    write_atomically(output / "law.json", json.dumps(as_json(study), indent=1) + "\n")
    with matplotlib.rc_context(STYLE):
        picture.draw(study).savefig(output / "scaling.png", dpi=PNG_DPI, facecolor="white")
    write_atomically(output / "index.html", page.render(study))
    return output / "index.html"


def as_json(study: ScalingStudy) -> dict[str, Any]:
    """Return law, intervals, prediction and choices as plain values."""
    fit = study.fit
    return {
        "law": FORMULA,
        "units": "nats per token; N: active parameters without embeddings and routers; D: tokens",
        "constants": {name: fit.law.constants[name] for name in fit.free},
        "scales": asdict(fit.law.scales),
        "bootstrap_intervals": fit.bootstrap_intervals,
        "jacobian_intervals": fit.jacobian_intervals,
        "at_bound": list(fit.at_bound),
        "points": len(fit.points),
        "rms_relative_residual": fit.rms,
        "r_squared": fit.r_squared,
        "noise": None if study.noise is None else study.noise.mean,
        "heldout": [
            {"name": point.name, "loss": point.loss, "training_flops": point.training_flops, "predicted": asdict(told)}
            for point, told in study.heldout
        ],
        "choices": [asdict(choice) for choice in study.choices],
    }
