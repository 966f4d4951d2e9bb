"""A matched study as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeAlias

from moe_train.observe.study.graph.table import difference_text, lines, speed_text
from moe_train.observe.study.matched.outcome import Comparison, MatchedOutcome
from moe_train.observe.study.outcome import Spread
from moe_train.observe.study.table import ABSENT, figure_text

Cell: TypeAlias = Callable[[Comparison, str], str]
EXPLANATION = """
Equal: what a variant has in common with the first line of its table, its reference, to 3 %. Parameters: all that are
trained. Training FLOPs: forward and backward, by the closed forms, of one token and of the whole run. Held-out loss:
nats per token over the whole held-out text, every choice made without later tokens; mean ± standard deviation over the
seeds. Minus reference: run by run with the same seed, below zero is better than the reference; in brackets the pairs,
and in how many of them it was. Tokens/s: in training, of each run the median over its records; median over the seeds,
and their lowest and highest; then relative to the reference's run of the same seed.
""".strip()
LOOKING_AHEAD = """
Looking ahead: the same loss with the choices of training, which later tokens take part in. No model that writes text
reaches it: it is there to show what the causal choice costs. Right: share of tokens for which both choices agree, mean
over blocks and the train records of the last quarter of the run.
""".strip()


def markdown(comparison: Comparison) -> str:
    """Return a table per group, then of variants that the plan does not know, their legend, and what is missing."""
    known = [[v for v in group.variants if comparison.of(v)] for group in comparison.plan.groups]
    others = [variant for variant in comparison.variants if comparison.plan.group_of(variant) is None]
    columns = columns_of(comparison)
    tables = [
        lines(list(columns), [[cell(comparison, variant) for cell in columns.values()] for variant in variants])
        for variants in (*known, others)
        if variants
    ]
    ahead = [LOOKING_AHEAD] if any(run.loss_looking_ahead is not None for run in comparison.runs) else []
    return "\n\n".join([*tables, EXPLANATION, *ahead, *missing_text(comparison)]) + "\n"


def columns_of(comparison: Comparison) -> dict[str, Cell]:
    """Return how each column is filled, by heading; those of choices only where there are any."""
    columns: dict[str, Cell] = {
        "variant": lambda c, v: f"`{v}`",
        "what": lambda c, v: c.plan.told(v)[0] or ABSENT,
        "equal": lambda c, v: ", ".join(c.plan.told(v)[1]) or ABSENT,
        "seeds": lambda c, v: str(len(c.of(v))),
        "parameters": lambda c, v: counts_text([run.parameters for run in c.of(v).values()]),
        "tokens": lambda c, v: counts_text([run.tokens for run in c.of(v).values()]),
        "training MFLOPs per token": lambda c, v: number_text(c.spread(v, lambda run: run.flops_per_token), 1e6, ".2f"),
        "training TFLOPs": lambda c, v: number_text(c.spread(v, lambda run: run.training_flops), 1e12, ".2f"),
        "held-out loss": lambda c, v: figure_text(c.spread(v, lambda run: run.loss), ".4f"),
        "looking ahead": lambda c, v: figure_text(c.spread(v, ahead_of), ".4f"),
        "right": lambda c, v: number_text(c.spread(v, accuracy_of), 1, ".1%"),
        "minus reference": lambda c, v: difference_text(c.difference(v)),
        "tokens/s": lambda c, v: range_text(c.spread(v, lambda run: run.tokens_per_s)),
        "relative": lambda c, v: speed_text(c.speed(v)),
    }
    for heading, figure in (("looking ahead", ahead_of), ("right", accuracy_of)):
        if all(figure(run) is None for run in comparison.runs):
            del columns[heading]
    return columns


def ahead_of(run: MatchedOutcome) -> float | None:
    """Return the loss with the choices of training."""
    return run.loss_looking_ahead


def accuracy_of(run: MatchedOutcome) -> float | None:
    """Return how often the causal choice is right."""
    return run.causal_accuracy


def missing_text(comparison: Comparison) -> list[str]:
    """Return a sentence that names the runs which are not there, or nothing."""
    if not comparison.missing:
        return []
    named = (f"`{variant}` (seed {', '.join(map(str, seeds))})" for variant, seeds in comparison.missing.items())
    return [f"Missing, or not finished: {'; '.join(named)}."]


def counts_text(values: Sequence[int]) -> str:
    """Return what all runs of a variant have in common; several, where they differ."""
    return " or ".join(f"{value:,}" for value in sorted(set(values)))


def number_text(spread: Spread | None, unit: float, digits: str) -> str:
    """Return the mean in a unit."""
    return ABSENT if spread is None else f"{spread.mean / unit:{digits}}"


def range_text(spread: Spread | None) -> str:
    """Return the median, with the lowest and the highest of several."""
    if spread is None:
        return ABSENT
    middle = f"{statistics.median(spread.values):,.0f}"
    return middle if len(spread.values) == 1 else f"{middle} ({min(spread.values):,.0f} to {max(spread.values):,.0f})"
