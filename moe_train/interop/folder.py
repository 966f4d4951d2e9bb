"""A Hugging Face folder as a mapping from names to plain tensors, of which only the asked pieces are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_train.errors import DataError, Problem
from moe_train.interop.quantised import Stored, resolve
from moe_train.interop.shards import Shards, read_json

CONFIG = "config.json"


class PublicFolder:
    """A model of the rest of the world on the disk.

    Attributes:
        path: the folder.
        config: its config.json.
        shapes: shape of every tensor by name, when read: quantised ones appear as what they stand for.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], shards: Shards, stored: Mapping[str, Stored]) -> None:
        self.path, self.config = path, config
        self._shards, self._stored = shards, stored
        self.shapes = {name: one.shape for name, one in stored.items()}

    @classmethod
    def open(cls, path: Path) -> PublicFolder:
        """List what a folder holds; reads no values.

        Raises:
            DataError: no folder, no config.json, no weights, or weights that are damaged or cannot be read; lists all
                that is wrong with the files.
        """
        config = read_public_config(path)
        shards = Shards.open(path)
        stored, problems = resolve(shards.entries, config, str(path))
        if problems:
            raise DataError(problems)
        return cls(path, config, shards, stored)

    def read(self, name: str, index: int | slice = slice(None)) -> Tensor:
        """Return ``tensor[index]`` on the CPU, reading no more than that.

        Args:
            name: one of `shapes`.
            index: into dimension 0.

        Returns:
            The values in the stored dtype; fp32 for quantised ones. Not to be written to: it may be the file itself.

        Raises:
            DataError: the disk fails.
        """
        return self._stored[name].read(self._shards, index)


def read_public_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder.

    Raises:
        DataError: there is no such folder, no such file, or no JSON object in it.
    """
    if not path.is_dir():
        remedy = "download the model and name its folder: hf download NAME --local-dir DIR"
        raise DataError(Problem(str(path), None, "is not a folder", remedy))
    return read_json(path / CONFIG)
