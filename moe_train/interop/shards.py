"""The safetensors files of a Hugging Face folder: what they hold is listed without reading it, and read in pieces.

Files are memory-mapped: pages that were read belong to the system's cache, not to this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from moe_train.errors import DataError, Problem

SINGLE = "model.safetensors"
"""Name of the file of a model that is one file."""
INDEX = "model.safetensors.index.json"
"""Name of the table from tensors to files."""
AGAIN = "download or copy the folder again"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        file: name of its file.
        shape: as stored.
        dtype: safetensors' name of its number format: ``F32``, ``BF16``, ``F8_E4M3``, ``U8``, ...
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The safetensors files of one folder.

    Attributes:
        folder: where they lie.
        entries: every stored tensor by name.
    """

    def __init__(self, folder: Path, opened: dict[str, Any], entries: dict[str, Entry]) -> None:
        self.folder, self._opened, self.entries = folder, opened, entries

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """List the tensors of a folder.

        Raises:
            DataError: no weights, weights in pickles only, files missing or truncated, tensors missing; all at once.
        """
        where = _weight_map(folder)
        problems: list[Problem] = []
        opened: dict[str, Any] = {}
        entries: dict[str, Entry] = {}
        for file in sorted(set(where.values()) if where else {SINGLE}):
            try:
                opened[file] = _mapped(folder / file)
                listed = _entries_of(opened[file], file)
            except (OSError, SafetensorError) as error:
                problems.append(_unreadable(folder / file, error))
                continue
            lacking = [name for name, home in (where or {}).items() if home == file and name not in listed]
            problems += [
                Problem(str(folder / file), None, f"lacks {name}, which {INDEX} puts there", AGAIN) for name in lacking
            ]
            entries |= {name: entry for name, entry in listed.items() if where is None or where.get(name) == file}
        if problems:
            raise DataError(problems)
        return cls(folder, opened, entries)

    def read(self, name: str, index: int | slice = slice(None)) -> Tensor:
        """Return ``tensor[index]`` of a stored tensor, on the CPU, reading no more than that.

        Raises:
            DataError: the disk fails.
        """
        file = self.entries[name].file
        try:
            # A tensor without dimensions has no slices.
            return cast(
                Tensor, self._slice(name)[index] if self.entries[name].shape else self._opened[file].get_tensor(name)
            )
        except (OSError, SafetensorError) as error:
            raise DataError(_unreadable(self.folder / file, error)) from error

    def _slice(self, name: str) -> Any:
        return self._opened[self.entries[name].file].get_slice(name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DataError: no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise DataError(Problem(str(path), None, rule, "name a folder with a Hugging Face model")) from error
    except ValueError as error:  # invalid JSON, or bytes that are no text
        raise DataError(Problem(str(path), None, f"is not JSON: {error}", AGAIN)) from error
    if not isinstance(found, dict):
        raise DataError(Problem(str(path), None, "is not a JSON object", AGAIN))
    return found


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor; None when everything is in one file."""
    if (folder / INDEX).is_file():
        found = read_json(folder / INDEX).get("weight_map")
        if not isinstance(found, dict) or not found or not all(map(_is_file_name, found.values())):
            rule = "has no weight_map from tensors to names of files beside it"
            raise DataError(Problem(str(folder / INDEX), None, rule, AGAIN))
        return found
    if (folder / SINGLE).is_file():
        return None
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        rule = "holds weights as pickles only, which can run code when they are read"
        raise DataError(
            Problem(str(folder), None, rule, "save it as safetensors: model.save_pretrained in transformers")
        )
    rule = f"holds neither {SINGLE} nor {INDEX}"
    raise DataError(Problem(str(folder), None, rule, "name a folder with the model's weights"))


def _is_file_name(value: object) -> bool:
    """Whether an index names a file of its own folder: it must not lead elsewhere on the disk."""
    return isinstance(value, str) and bool(value) and value not in (".", "..") and Path(value).name == value


def _mapped(path: Path) -> Any:
    # The stub leaves this function without types.
    return cast(Callable[..., Any], safetensors.safe_open)(path, framework="pt")


def _entries_of(opened: Any, file: str) -> dict[str, Entry]:
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return {name: Entry(file, tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(str(path), None, "is missing", AGAIN)
    return Problem(str(path), None, f"is damaged or truncated: {error}", AGAIN)
