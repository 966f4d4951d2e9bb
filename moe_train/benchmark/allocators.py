"""Memory allocators under which a process may run: peers are given each of them, and the fastest counts."""

from __future__ import annotations

import ctypes.util
from collections.abc import Mapping
from typing import Final

from moe_train.config.process import MALLOC, cores

TUNED: Final[Mapping[str, str]] = MALLOC
"""How this project's commands set glibc's: buffers are kept, not handed to the kernel and faulted in."""
PRELOADED: Final[Mapping[str, tuple[str, ...]]] = {
    "tcmalloc": ("tcmalloc_minimal", "tcmalloc"),
    "jemalloc": ("jemalloc",),
}
"""Libraries to be put before glibc, by their names without ``lib``: the first that is found."""
NEUTRAL: Final[Mapping[str, str | None]] = dict.fromkeys((*TUNED, "GLIBC_TUNABLES", "MALLOC_CONF", "LD_PRELOAD"))
"""No setting at all, whatever this process runs under."""


def allocators() -> dict[str, dict[str, str | None]]:
    """Return the variables of each allocator that this machine has, by name; ``default`` and ``tuned`` come first."""
    found: dict[str, dict[str, str | None]] = {"default": dict(NEUTRAL), "tuned": {**NEUTRAL, **TUNED}}
    for name, libraries in PRELOADED.items():
        paths = (ctypes.util.find_library(library) for library in libraries)
        path = next((path for path in paths if path is not None), None)
        if path is not None:
            found[name] = {**NEUTRAL, "LD_PRELOAD": path}
    return found


def threads_of(threads: int | None) -> dict[str, str | None]:
    """Return the variables of a process with so many threads; None: as many as the cores it may use."""
    number = str(threads or num_cores())
    return {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}


def num_cores() -> int:
    """Return the physical cores that this process may use."""
    return cores()
