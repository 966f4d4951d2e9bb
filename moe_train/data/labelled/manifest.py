"""What a folder of labelled tokens holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moe_train.data.manifest import FolderManifest
from moe_train.data.shards import Split

LABELLED_FORMAT: Literal[1] = 1
"""Raised when files, split or the cleaning of a source change: folders of another version are not used."""

INDEX = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("label", "<i8")])
"""A row per text of a split: its tokens, its bytes of UTF-8, the number of its class."""


class LabelledTotals(BaseModel):
    """Size of a split."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tokens: int
    """Tokens; no boundaries are among them."""
    bytes: int
    """Bytes of UTF-8."""
    by_class: tuple[int, ...]
    """Texts of each class, in the order of the classes."""


class LabelledManifest(FolderManifest):
    """What a folder of labelled tokens holds: for each split SPLIT.tokens.bin, SPLIT.texts.bin and SPLIT.index.npy."""

    format_version: Literal[1] = LABELLED_FORMAT
    """Version of the files."""
    classes: tuple[str, ...]
    """Names of the classes by number."""
    splits: dict[Split, LabelledTotals]
    """Size of each split."""
    examples: int
    """Rows of the source with a text."""
    copies: int
    """Rows whose text had stood in another one: removed before the split."""
    conflicts: int
    """Texts whose copies have different classes; they keep the class that most have, in a tie the first."""
    tokenless: int
    """Texts of which the tokenizer makes no token: left out."""

    def account(self) -> str:
        """Return a line on what was read, removed and split."""
        sizes = {split: sum(total.by_class) for split, total in self.splits.items()}
        per_class = zip(*(total.by_class for total in self.splits.values()), strict=True)
        counts = ", ".join(f"{sum(both):,} {name}" for name, both in zip(self.classes, per_class, strict=True))
        line = f"{sizes['train']:,} texts to train on, {sizes['heldout']:,} held out ({counts})"
        if self.copies:
            line += f"; {self.copies:,} copies removed"
        if self.conflicts:
            line += f", {self.conflicts:,} texts had copies in several classes"
        if self.tokenless:
            line += f"; {self.tokenless:,} texts without tokens left out"
        return line


@dataclass(frozen=True)
class PreparedTexts:
    """A complete folder of labelled tokens.

    Attributes:
        folder: with manifest, tokenizer and the files of both splits.
        manifest: what it holds.
    """

    folder: Path
    manifest: LabelledManifest
