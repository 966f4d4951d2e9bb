"""Writing the table and the picture of the study of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.observe.report.drawing import BLUE, INK, new_figure
from moe_train.observe.study.result import Study, publish, read_all
from moe_train.observe.study.sentiment.outcome import FIGURES, Line, group, read_judged
from moe_train.observe.study.table import figure_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = {"load_balance_variance": ".2g"}
EXPLANATION = """
Of the last evaluation, over all held-out texts; mean ± standard deviation over the seeds. Largest class: accuracy of
always telling it. SI (specialisation index) and LBV (load-balance variance): mean over the layers with experts. Least
used expert: its share of all choices in its layer; far below an even share of 1/E the router has collapsed.
""".strip()
DRAWN = ("accuracy", "least_used", "specialisation")
FRAME_INCHES, LINE_INCHES = 1.0, 0.24


def write_sentiment_study(run_dirs: Sequence[Path], output: Path) -> Study:
    """Compare the finished runs among ``run_dirs`` and write ``table.md`` and ``picture.png`` into ``output``.

    Raises:
        DataError: none of them is finished.
        OSError: the folder cannot be written.
    """
    judged, unfinished = read_all(run_dirs, read_judged, "runs/sentiment_study-sentiment_vader-seed_0")
    lines = group(judged)
    return publish(markdown(lines), lambda: draw(lines), output, unfinished)


def markdown(lines: Sequence[Line]) -> str:
    """Return the table with a legend; one line per variant."""
    headings = ["variant", "seeds", "parameters", *FIGURES.values()]
    rows = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for line in lines:
        figures = [figure_text(line.spread(name), DIGITS.get(name, ".3f")) for name in FIGURES]
        parameters = " or ".join(sorted({f"{run.parameters:,}" for run in line.runs}))
        rows.append(f"| {' | '.join([f'`{line.variant}`', str(len(line.runs)), parameters, *figures])} |")
    return "\n".join([*rows, "", EXPLANATION]) + "\n"


def draw(lines: Sequence[Line]) -> Figure:
    """Return a dot per run and a bar at the mean, variants from top to bottom; a grey one at the largest class."""
    figure = new_figure(FRAME_INCHES + LINE_INCHES * len(lines))
    panels = figure.subplots(1, len(DRAWN), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, DRAWN, strict=True):
        for place, line in enumerate(lines):
            spread, majority = line.spread(name), line.spread("majority")
            if spread is not None:
                axes.plot(spread.values, [place] * len(spread.values), "o", color=BLUE, markersize=3.5, alpha=0.45)
                axes.plot(spread.mean, place, "|", color=BLUE, markersize=9)
            if name == "accuracy" and majority is not None:
                axes.plot(majority.mean, place, "|", color=INK, markersize=9, alpha=0.5)
        axes.set(title=FIGURES[name])
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(lines)), labels=[line.variant.replace("_", " ") for line in lines])
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    return figure
