"""The graph study as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from moe_train.observe.study.graph.outcome import BASE, KINDS, SIZES, Comparison
from moe_train.observe.study.outcome import Spread
from moe_train.observe.study.table import ABSENT, figure_text

HEADINGS = (
    "variant",
    "seeds",
    "parameters",
    "training MFLOPs per token",
    "held-out loss",
    "tokens/s relative to dense",
    "expert similarity",
    "message norm",
)
EXPLANATION = """
graph: experts coupled by a learned graph. silent: the same without messages. dense: equal FLOPs. sparse: top-2 of 8
experts, equal parameters. e2, e4, e8: so many experts, 2 graph layers; l0, l1, l3: so many graph layers, 4 experts
(graph_e4 is also l2; graph_l0 has no messages). Other names: graph_e4 with one thing changed. Held-out loss: nats per
token over the whole held-out text, mean ± standard deviation over the seeds. Tokens/s: of each run the median over its
records, relative to the dense model of the same size and seed (other names: to dense_e4); median over the seeds, and
their lowest and highest. These runs took place at different times: the range shows how noisy that is, and
scripts/graph_cost.py measures in turn. Expert similarity: mean cosine between what two experts add. Message norm: what
an expert receives relative to what it sends. Both: mean over layers and the train records of the last quarter.
""".strip()
PAIRED = """
Paired differences of the held-out loss, run by run with the same seed and therefore the same data, mean ± standard
deviation; below zero: the first of the two is better. In brackets: pairs, and in how many of them it was better.
""".strip()


def markdown(comparison: Comparison) -> str:
    """Return all tables with their legends; those without a line are left out."""
    names = [*comparison.compared, *comparison.others]
    tokens = sorted({run.tokens for run in comparison.runs})
    told = f"Tokens per run: {', '.join(f'{count:,}' for count in tokens)}."
    parts = [lines(HEADINGS, [cells(comparison, name) for name in names]), f"{told}\n{EXPLANATION}"]
    if paired := [*size_lines(comparison)]:
        headings = ["size", *(f"graph - {kind}" for kind in KINDS[1:])]
        parts += [PAIRED, lines(headings, paired)]
    if changed := [*other_lines(comparison)]:
        parts.append(lines(["variant", f"- graph_{BASE}", f"- dense_{BASE}"], changed))
    return "\n\n".join(parts) + "\n"


def lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    texts = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return "\n".join([texts[0], "|---" * len(headings) + "|", *texts[1:]])


def cells(comparison: Comparison, name: str) -> list[str]:
    """Return the cells of one variant."""
    runs = list(comparison.of(name).values())
    flops = runs[0].training_flops
    return [
        f"`{name}`",
        str(len(runs)),
        f"{runs[0].parameters:,}",
        ABSENT if flops is None else f"{flops / 1e6:.2f}",
        figure_text(comparison.losses(name), ".4f"),
        speed_text(comparison.speed(name)),
        mean_text([run.similarity for run in runs], ".3f"),
        mean_text([run.message_norm for run in runs], ".2f"),
    ]


def size_lines(comparison: Comparison) -> list[list[str]]:
    """Return for each size the coupled model's loss minus that of each other kind."""
    found = {size: [comparison.difference(f"graph_{size}", f"{kind}_{size}") for kind in KINDS[1:]] for size in SIZES}
    return [[size, *map(difference_text, spreads)] for size, spreads in found.items() if any(spreads)]


def other_lines(comparison: Comparison) -> list[list[str]]:
    """Return for each other variant its loss minus that of the base, and minus that of the base's dense model."""
    references = (f"graph_{BASE}", f"dense_{BASE}")
    found = {name: [comparison.difference(name, other) for other in references] for name in comparison.others}
    rows = [[f"`{name}`", *map(difference_text, spreads)] for name, spreads in found.items() if any(spreads)]
    if block := comparison.difference("graph_block", "silent_block"):
        rows.append(["`graph_block` - `silent_block`", difference_text(block), ABSENT])
    return rows


def difference_text(spread: Spread | None) -> str:
    """Return mean and deviation of a difference with its sign, the number of pairs and of those below zero."""
    if spread is None:
        return ABSENT
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.4f}"
    better = sum(value < 0 for value in spread.values)
    return f"{spread.mean:+.4f}{deviation} ({len(spread.values)}, {better})"


def speed_text(spread: Spread | None) -> str:
    """Return the median of the ratios, with the lowest and the highest of several."""
    if spread is None:
        return ABSENT
    middle = f"{statistics.median(spread.values):.2f}"
    return middle if len(spread.values) == 1 else f"{middle} ({min(spread.values):.2f} to {max(spread.values):.2f})"


def mean_text(values: Sequence[float | None], digits: str) -> str:
    """Return the mean of what is known."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):{digits}}" if known else ABSENT
