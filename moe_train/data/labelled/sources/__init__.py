"""Where labelled texts come from: one file per kind of source, found by its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from moe_train.config.schema import SourceConfig
from moe_train.data.labelled.sources.base import Example, LabelledSource
from moe_train.data.labelled.sources.files import LabelledFiles
from moe_train.data.labelled.sources.huggingface import LabelledRows
from moe_train.data.labelled.sources.movies import Movies
from moe_train.data.labelled.sources.vader import Vader

__all__ = ["LABELLED_SOURCES", "Example", "LabelledSource", "open_labelled_source"]

LABELLED_SOURCES: dict[str, Callable[[SourceConfig], LabelledSource]] = {
    "vader": Vader,
    "rotten_tomatoes": Movies,
    "imdb": Movies,
    "text": LabelledFiles,
    "huggingface": LabelledRows,
}
"""Sources of labelled texts; each is made from its configuration."""


def open_labelled_source(data: SourceConfig) -> LabelledSource:
    """Return the source that the configuration names."""
    assert data.source in LABELLED_SOURCES, "the rules of the configuration ask for a source with labels"
    return LABELLED_SOURCES[data.source](data)
