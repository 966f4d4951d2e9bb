"""A study as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.observe.study.outcome import FIGURES, Spread, Variant

DIGITS = {"loss": ".4f", "max_violation": ".3f", "dropped_fraction": ".2%", "entropy": ".3f"}
ABSENT = "-"
FUTURE = "\\*"
EXPLANATION = """
Held-out loss: nats per token, over the whole held-out text, without capacity limit. Max violation (fullest expert over
the mean, minus one), dropped share of assignments and entropy of the router's probabilities in nats: mean over layers
and over the train records of the last quarter of the run. Mean ± standard deviation over the seeds.
""".strip()
FUTURE_EXPLANATION = "\\* Later tokens decide about earlier ones, in evaluation too: this loss cannot be compared."


def markdown(variants: Sequence[Variant]) -> str:
    """Return the table with a legend; one line per variant, in the order given."""
    headings = ["variant", "seeds", "parameters", "active", *FIGURES.values()]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(cells(variant))} |" for variant in variants]
    tokens = sorted({run.tokens for variant in variants for run in variant.runs})
    lines += ["", f"Tokens per run: {', '.join(f'{count:,}' for count in tokens)}.", EXPLANATION]
    if any(run.sees_future for variant in variants for run in variant.runs):
        lines += ["", FUTURE_EXPLANATION]
    return "\n".join(lines) + "\n"


def cells(variant: Variant) -> list[str]:
    """Return the cells of one line."""
    first = variant.runs[0]
    name = f"`{variant.name}`" + (f" {FUTURE}" if first.sees_future else "")
    figures = [figure_text(variant.spread(figure), DIGITS[figure]) for figure in FIGURES]
    return [name, str(len(variant.runs)), f"{first.parameters:,}", f"{first.active_parameters:,}", *figures]


def figure_text(spread: Spread | None, digits: str) -> str:
    """Return mean and deviation; a single run has no deviation."""
    if spread is None:
        return ABSENT
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:{digits}}"
    return f"{spread.mean:{digits}}{deviation}"
