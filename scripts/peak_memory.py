"""The most memory that a piece of work holds at once, beside what existed before it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageCount(TorchDispatchMode):
    """Adds up the storages that operators make, and takes off those that are freed.

    What an operator holds only inside of itself is not seen.

    Attributes:
        held_bytes: now.
        peak_bytes: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.peak_bytes = 0
        self.alive: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and look at the storages of its results; those of its arguments are no new ones."""
        arguments = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in arguments}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self.take(leaf.untyped_storage())
        return result

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive[key] = weakref.finalize(storage, self.give, key, size)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def give(self, key: int, size: int) -> None:
        """Forget a storage that was freed."""
        del self.alive[key]
        self.held_bytes -= size


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Return the peak of ``work``: of the allocator on a GPU, of the storages that operators make on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with StorageCount() as counted:
        work()
    return counted.peak_bytes
