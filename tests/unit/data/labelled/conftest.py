"""Small labelled files and their preparation, for all tests of labelled texts."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.config.task import SentimentTask
from moe_train.data.labelled.corpus import LabelledCorpus, open_labelled

BYTES = TokenizerConfig(kind="bytes")

MakeLabelled = Callable[..., DataConfig]


@pytest.fixture
def make_labelled(tmp_path: Path) -> MakeLabelled:
    """Configuration of a CSV file with the given texts and labels."""

    def make(rows: list[tuple[str, str]], name: str = "rows.csv", **settings: object) -> DataConfig:
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        chosen = {"cache_dir": str(tmp_path / "cache"), "heldout_fraction": 0.25, **settings}
        return DataConfig(source="text", path=str(tmp_path / name), **chosen)

    return make


@pytest.fixture
def open_rows(make_labelled: MakeLabelled) -> Callable[..., LabelledCorpus]:
    def run(
        rows: list[tuple[str, str]],
        tokenizer: TokenizerConfig = BYTES,
        classes: tuple[str, ...] | None = None,
        **settings: object,
    ) -> LabelledCorpus:
        return open_labelled(make_labelled(rows, **settings), tokenizer, SentimentTask(classes=classes), lambda f: f())

    return run


@pytest.fixture
def some_rows() -> list[tuple[str, str]]:
    """40 good, 20 bad and 12 middling texts, all different."""
    kinds = (("good", 40), ("bad", 20), ("middling", 12))
    names = ("Anna", "Ben", "Carl", "Dora", "Emil", "Fritz", "Gerda", "Hans", "Ida", "Jan")
    return [
        (f"{names[n % 10]} and {names[n // 10]} found it {label}, é", label)
        for label, count in kinds
        for n in range(count)
    ]
