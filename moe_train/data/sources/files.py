"""Finding the files that a path of the configuration names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_train.data.sources.base import Identity
from moe_train.errors import DataError, Problem


def find_files(path: str, suffixes: tuple[str, ...], key: str) -> list[Path]:
    """Return the files of a path, sorted.

    Args:
        path: a file, a folder (searched recursively) or a glob; ``~`` is the home folder.
        suffixes: endings of file names that are read; others in a folder are passed over.
        key: configuration key of the path, for errors.

    Raises:
        DataError: nothing is there, or nothing with a known ending.
    """
    places = expand(path)
    is_folder = len(places) == 1 and places[0].is_dir()
    found = [file for file in (places[0].rglob("*") if is_folder else places) if file.is_file()]
    if not found:
        rule = "is an empty folder" if is_folder else "does not exist and matches no file"
        raise DataError(Problem(key, path, rule, "give a file, a folder or a glob that matches files"))
    readable = sorted(file for file in found if file.suffix in suffixes)
    if not readable:
        rule = f"has no file that ends in {', '.join(suffixes)} among {len(found)}"
        raise DataError(Problem(key, path, rule, "convert the files or name others"))
    return readable


def expand(path: str) -> list[Path]:
    """Return what a path or a glob names, sorted; ``~`` is the home folder."""
    place = Path(path).expanduser()
    if place.exists():
        return [place]
    return sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))


def files_identity(files: Iterable[Path]) -> Identity:
    """Return size in bytes and time of modification in ns by path: a change shows without reading the files."""
    stats = {str(file.resolve()): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
