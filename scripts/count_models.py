"""Prints the table of docs/models.md: every preset with its published and its exact number of parameters.

Usage: python scripts/count_models.py

What is published comes from line 1 of the preset's file, the exact numbers from its values. Multi-token prediction is
counted beside the model, as the published figures do.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from moe_train.config.compose import compose_config
from moe_train.config.groups import config_dir, options_of
from moe_train.config.schema import TrainConfig
from moe_train.models.counts import Counts, count

LINE = re.compile(r"# (?P<name>[^,]+), (?P<source>[^:;]+)(: (?P<published>[^;]+))?; exactly (?P<exact>.+)\.")
"""Line 1 of the file of a published model."""
HEADINGS = ("`model=`", "what", "source", "published", "total", "active", "active without embedding")


@dataclass(frozen=True)
class Published:
    """Line 1 of a preset.

    Attributes:
        name: of the model.
        source: where it was published.
        figures: its parameters as published; "-" where none are.
        exact: its parameters as counted here.
    """

    name: str
    source: str
    figures: str
    exact: str


def published(preset: str) -> Published | None:
    """Return what line 1 of a preset says, or None for one that is not a published model."""
    first = (config_dir() / "model" / f"{preset}.yaml").read_text().splitlines()[0]
    found = LINE.fullmatch(first)
    return Published(found["name"], found["source"], found["published"] or "-", found["exact"]) if found else None


CLASSES, WORDS = 3, 8192
"""What a classifier is counted with: the data says it in a run."""


@functools.cache
def counts_of(preset: str) -> Counts:
    """Count a preset; where it names no vocabulary, with that of the default tokenizer, or a classifier's."""
    told = [f"model.classifier.num_classes={CLASSES}"] if is_classifier(preset) else []
    config = compose_config("train", TrainConfig, lambda config: [], [f"model={preset}", *told])
    vocab_size = WORDS if is_classifier(preset) else config.tokenizer.vocab_size
    return count(config.model, vocab_size, config.data.seq_len)


def is_classifier(preset: str) -> bool:
    """Return whether a preset tells the class of a text."""
    return preset.endswith("_classifier")


def exact(counts: Counts) -> str:
    """Return the numbers as line 1 of a published model states them."""
    modules = f", {counts.total:,} with MTP" if counts.mtp else ""
    return f"{counts.main:,}, {counts.active:,} active{modules}"


def line(preset: str) -> str:
    """Return a row of the table."""
    counts, about = counts_of(preset), published(preset)
    small = "tells the class of a text" if is_classifier(preset) else "small, for a laptop"
    what = (about.name, about.source, about.figures) if about else (small, "-", "-")
    total = f"{counts.main:,}" + (f" (+ {counts.mtp:,} MTP)" if counts.mtp else "")
    cells = (f"`{preset}`", *what, total, f"{counts.active:,}", f"{counts.active_without_embedding:,}")
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the whole table: the published models, the small ones, the classifiers."""
    shown = ("_tiny", "_classifier")
    presets = [preset for preset in options_of("model") if published(preset) or preset.endswith(shown)]
    presets.sort(
        key=lambda preset: (
            is_classifier(preset),
            published(preset) is None,
            re.sub(r"\d+", lambda m: m[0].zfill(4), preset),
        )
    )
    rule = "|---|---|---|---|" + "---:|" * 3
    return "\n".join([f"| {' | '.join(HEADINGS)} |", rule, *map(line, presets)])


if __name__ == "__main__":
    print(table())
