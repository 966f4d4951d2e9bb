"""Where documents come from: one file per kind of source, found by its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from moe_train.config.schema import DataConfig, SourceConfig
from moe_train.data.sources.base import Document, Identity, Source
from moe_train.data.sources.huggingface import HuggingFace
from moe_train.data.sources.imdb import Imdb
from moe_train.data.sources.mix import Mix, WeightedSource
from moe_train.data.sources.shakespeare import Shakespeare
from moe_train.data.sources.text import TextFiles
from moe_train.data.sources.wikipedia import Wikipedia
from moe_train.errors import ConfigError, Problem

__all__ = ["SOURCES", "Document", "Identity", "Source", "open_source"]

SOURCES: dict[str, Callable[[SourceConfig, str], Source]] = {
    "shakespeare": Shakespeare,
    "wikipedia": Wikipedia,
    "imdb": Imdb,
    "text": TextFiles,
    "huggingface": HuggingFace,
}
"""Sources of text; each is made from its configuration and the domain label of its documents."""


def open_source(data: DataConfig) -> Source:
    """Return the source that the configuration names.

    Raises:
        ConfigError: a source, or a part of a mix, that does not give text.
    """
    if data.source != "mix":
        return _open_single("data", data, data.source)
    parts = {
        label: WeightedSource(_open_single(f"data.parts.{label}", part, label), part.weight)
        for label, part in data.parts.items()
    }
    return Mix(parts)


def _open_single(key: str, config: SourceConfig, domain: str) -> Source:
    if config.source not in SOURCES:
        remedy = f"name one of {', '.join(SOURCES)}"
        raise ConfigError(Problem(f"{key}.source", config.source, "does not give text to tokenise here", remedy))
    return SOURCES[config.source](config, domain)
