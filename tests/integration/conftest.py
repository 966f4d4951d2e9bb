"""A small text of the user's own, prepared once for all runs."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest

from launch import TINY


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 KB of invented words: enough structure for a tiny model to beat the letters' frequencies in 100 steps."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8))) for _ in range(60)]
    paragraphs = [" ".join(draw.choices(words, k=100)).capitalize() + ".\n\n" for _ in range(350)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(paragraphs))
    return path


@pytest.fixture(scope="session")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of the data: one cache, so that the text is encoded once."""
    cache = tmp_path_factory.mktemp("cache")
    return ["data=text", f"data.path={text}", f"data.cache_dir={cache}", "tokenizer=bytes"]


@pytest.fixture(scope="session")
def tiny(data: list[str]) -> list[str]:
    """The settings of a training whose steps take a few hundredths of a second."""
    return [*TINY, *data]
