"""Files that appear whole or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from moe_train.errors import DataError, Problem

logger = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and give it its name.

    Raises:
        DataError: the disk is full or refuses; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        remedy = "free space there, or name a folder that you may write"
        raise DataError(Problem(str(path), None, f"cannot be written: {error.strerror}", remedy)) from error


def npy(array: np.ndarray) -> bytes:
    """Return the contents of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Keep other processes out of what ``lock_file`` stands for; the system frees the lock when a process dies."""
    lock = filelock.FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.warning("another process is preparing this corpus (%s); waiting for it", lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
