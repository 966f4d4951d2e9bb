"""Functions that torch.compile may fuse into one pass over memory; without it they run as they stand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
ALL: list[Pointwise[Any, Any]] = []
"""Every function that was marked."""


class Pointwise(Generic[Arguments, Result]):
    """A pure function of tensors, and its compiled form while there is one.

    Args:
        function: of tensors and plain values; works element by element or row by row, changes nothing.
    """

    def __init__(self, function: Callable[Arguments, Result]) -> None:
        self.function = function
        self.compiled: Callable[Arguments, Result] | None = None
        functools.update_wrapper(self, function)
        ALL.append(self)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the compiled form, or else the function."""
        return (self.compiled or self.function)(*args, **kwargs)


def pointwise(function: Callable[Arguments, Result]) -> Pointwise[Arguments, Result]:
    """Mark a function as one that may be fused."""
    return Pointwise(function)


def fuse(backend: str | None) -> None:
    """Compile every marked function with a backend of torch.compile (None: none) from its next call on.

    One kernel serves any number of rows: how many tokens come to an expert is another number in each step.
    """
    for function in ALL:
        function.compiled = None if backend is None else torch.compile(function.function, backend=backend, dynamic=True)
