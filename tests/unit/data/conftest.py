"""Small corpora and their preparation, for all tests of the data room."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.manifest import PreparedCorpus
from moe_train.data.pack import prepare
from moe_train.data.progress import no_progress

BYTES = TokenizerConfig(kind="bytes")

MakeData = Callable[..., DataConfig]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(texts: list[str], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_data(tmp_path: Path, write_jsonl: Callable[..., Path]) -> MakeData:
    """Configuration of a corpus with the given texts, one document each, in several shards."""

    def make(texts: list[str], **settings: object) -> DataConfig:
        chosen = {"cache_dir": str(tmp_path / "cache"), "shard_bytes": 200, "heldout_fraction": 0.1, **settings}
        return DataConfig(source="text", path=str(write_jsonl(texts)), **chosen)

    return make


@pytest.fixture
def prepare_texts(make_data: MakeData) -> Callable[..., PreparedCorpus]:
    def run(texts: list[str], tokenizer: TokenizerConfig = BYTES, **settings: object) -> PreparedCorpus:
        return prepare(make_data(texts, **settings), tokenizer, None, no_progress)

    return run


@pytest.fixture
def some_texts() -> list[str]:
    return [f"document {number}: {'word ' * (number % 13)}é" for number in range(60)]
