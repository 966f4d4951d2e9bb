"""The page on a study of scaling: the law, its prediction, what to do with a budget, the runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from moe_train.observe.report import __name__ as report_package
from moe_train.observe.report.drawing import STYLE, embed
from moe_train.observe.report.page import PAGE
from moe_train.observe.report.sections import section, table
from moe_train.observe.study.scaling import picture
from moe_train.observe.study.scaling.capacity import uniform_drop_rate
from moe_train.observe.study.scaling.fit import CONFIDENCE
from moe_train.observe.study.scaling.frontier import Choice
from moe_train.observe.study.scaling.law import FORMULA
from moe_train.observe.study.scaling.points import Point

if TYPE_CHECKING:
    from moe_train.observe.study.scaling.result import ScalingStudy

MEANING = {
    "c": "loss that neither size nor text removes, nats",
    "A": "what the size costs at N0, nats",
    "alpha": "by which power of N that falls",
    "mu": "by which power of E it falls",
    "gamma": "how much that power grows with ln G",
    "B": "what the tokens cost at D0, nats",
    "beta": "by which power of D that falls",
    "omega": "by which power of E it rises",
}
SYMBOLS = (
    "N: active parameters of the blocks, without routers; D: tokens; E: experts' weights stored over used (1: dense); "
    "G: experts that a token uses, each 1/G as wide. Loss: held-out, nats per token."
)
ABSENT = "-"


def render(study: ScalingStudy) -> str:
    """Return the page as HTML that needs nothing else."""
    style = resources.files(report_package).joinpath("page.css").read_text(encoding="utf-8")
    parts = (heading, pictured, law, prediction, spending, capacity, runs)
    body = "\n".join(part(study) for part in parts)
    return PAGE.format(title=escape(f"{study.name}: scaling laws"), style=style, body=body)


def heading(study: ScalingStudy) -> str:
    """Return the name and what is in the study."""
    told = f"{len(study.points)} finished runs, {len(study.fit.points)} of them fitted."
    if study.unfinished:
        told += f" Left out, not finished or of another kind: {', '.join(study.unfinished)}."
    return f"<h1>{escape(study.name)}</h1>\n{paragraph(told)}"


def pictured(study: ScalingStudy) -> str:
    """Return the picture."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = embed(picture.draw(study), "the study in six panels")
    caption = "Solid: within what was measured. Diamonds: the size of the least loss at these FLOPs."
    return section("Picture", f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")


def law(study: ScalingStudy) -> str:
    """Return the law with its constants and how well it fits."""
    fit = study.fit
    rows = []
    for name, meaning in MEANING.items():
        if name in fit.free:
            at_bound = ", at its bound" if name in fit.at_bound else ""
            ends = range_text(fit.bootstrap_intervals[name]), range_text(fit.jacobian_intervals[name])
            rows.append((name, meaning + at_bound, f"{fit.law.constants[name]:.4f}", *ends))
    head = ("constant", "what", "value", f"{CONFIDENCE:.0%} interval, bootstrap", "the same, Jacobian")
    scales = fit.law.scales
    middle = f"N0 = {scales.parameters:,.0f}, D0 = {scales.tokens:,.0f}, G0 = {scales.granularity:g}."
    body = f"<pre>{escape(FORMULA)}</pre>" + paragraph(SYMBOLS) + paragraph(middle) + table(head, rows)
    return section("Law", body + "".join(paragraph(told) for told in quality(study)))


def quality(study: ScalingStudy) -> list[str]:
    """Return how close the law comes to its points, how noisy these are, and what it leaves out."""
    fit = study.fit
    told = [f"Relative residuals: {fit.rms:.2%} (root mean square). R² = {fit.r_squared:.4f}."]
    if study.noise is not None:
        told.append(f"Runs that differ in the seed alone: standard deviation {study.noise.mean:.2%} of their loss.")
    if "mu" not in fit.free:
        told.append("All runs have the same E: mu and omega are left out; it says nothing of experts.")
    if "gamma" not in fit.free:
        told.append("All experts have the same G: gamma is left out; it says nothing of granularity.")
    return told


def prediction(study: ScalingStudy) -> str:
    """Return what the law says of the largest runs, which it was not fitted to."""
    rows = [
        (point.name, picture.flops_text(point.training_flops), f"{point.loss:.4f}", f"{told.loss:.4f}",
         range_text((told.low, told.high)), f"{told.loss / point.loss - 1:+.2%}")
        for point, told in study.heldout
    ]  # fmt: skip
    head = ("held-out run", "training", "measured", "predicted", f"{CONFIDENCE:.0%} interval", "error")
    most = max(point.training_flops for point in study.fit.points)
    note = f"The largest run of the fit had {picture.flops_text(most)}."
    return section("Prediction", table(head, rows) + paragraph(note))


def spending(study: ScalingStudy) -> str:
    """Return what each budget is best spent on."""
    head = ("training", "N", "D", "E", "G", "loss", "interval", "resamples that agree on E and G", "not measured")
    note = (
        "Least loss by the law over sizes and shapes, routers paid for. E and G are looked for to one octave beyond "
        "what was measured; the last column names what lies outside, where the law is a guess."
    )
    return section("What to do with a budget", table(head, [cells(c) for c in study.choices]) + paragraph(note))


def cells(choice: Choice) -> Sequence[str]:
    """Return the cells of one budget."""
    return (
        picture.flops_text(choice.budget), f"{choice.parameters:,.0f}", f"{choice.tokens:,.0f}",
        f"{choice.expansion:g}", f"{choice.granularity:g}" if choice.expansion > 1 else ABSENT, f"{choice.loss:.4f}",
        range_text((choice.low, choice.high)), f"{choice.agreeing:.0%}", ", ".join(choice.beyond) or ABSENT,
    )  # fmt: skip


def capacity(study: ScalingStudy) -> str:
    """Return drops and losses by capacity factor, or why there are none."""
    sweep = study.capacity
    if sweep is None:
        return section("Capacity", paragraph("No run has a capacity limit."))
    rows = [
        (f"{p.capacity_factor:g}", percent(p.dropped_fraction), percent(even_drops(p)), f"{p.loss:.4f}")
        for p in sweep.limited
    ]
    rows += [("none", percent(p.dropped_fraction), ABSENT, f"{p.loss:.4f}") for p in sweep.unlimited]
    note = (
        "The limit holds in training and per sequence; losses are measured without it. Even choice: what would be "
        "dropped if every token chose all experts with equal chance, independently."
    )
    return section("Capacity", table(("factor", "dropped", "even choice", "loss"), rows) + paragraph(note))


def even_drops(point: Point) -> float | None:
    """Return the drop rate of even choices under a run's limit."""
    if point.capacity_factor is None:
        return None
    return uniform_drop_rate(point.capacity_factor, point.seq_len, point.experts, point.top_k)


def runs(study: ScalingStudy) -> str:
    """Return all runs."""
    head = ("run", "shape", "N", "all experts", "D", "training", "factor", "measured", "law")
    rows = []
    for point in study.points:
        said = ABSENT if point.capacity_factor is not None else f"{study.predicted(point):.4f}"
        factor = ABSENT if point.capacity_factor is None else f"{point.capacity_factor:g}"
        sizes = f"{point.active_parameters:,}", f"{point.total_parameters:,}", f"{point.tokens:,}"
        cost = picture.flops_text(point.training_flops)
        rows.append((point.name, point.shape, *sizes, cost, factor, f"{point.loss:.4f}", said))
    return section("Runs", table(head, rows))


def paragraph(text: str) -> str:
    """Return a text as HTML."""
    return f"<p>{escape(text)}</p>"


def percent(value: float | None) -> str:
    """Return a share for people."""
    return ABSENT if value is None else f"{value:.2%}"


def range_text(ends: tuple[float, float]) -> str:
    """Return an interval for people."""
    return f"{ends[0]:.4f} to {ends[1]:.4f}"
