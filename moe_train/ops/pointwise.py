"""Functions that torch.compile may fuse into one pass over memory; without it they run as they stand.

Which form runs is a matter of the process, as the number of its threads is: such a function is called far below any
object that a configuration reaches, and one process runs one training. Whoever builds an engine says `fuse`; what
compares both forms takes turns with `fused`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Pointwise(Generic[Arguments, Result]):
    """A pure function of tensors, and its compiled form while there is one.

    Args:
        function: of tensors and plain values; works element by element or row by row, changes nothing. Give it tensors
            of one and the same number of dimensions: each number is compiled for by itself, as is each dtype.
    """

    def __init__(self, function: Callable[Arguments, Result]) -> None:
        self.function = function
        self.compiled: Callable[Arguments, Result] | None = None
        self.forms: dict[str, Callable[Arguments, Result]] = {}
        functools.update_wrapper(self, function)
        _MARKED.functions.append(self)
        self.use(_MARKED.backend)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the compiled form, or else the function."""
        return (self.compiled or self.function)(*args, **kwargs)

    def use(self, backend: str | None) -> None:
        """Compile from the next call on; None: call the function itself.

        One kernel serves any number of rows: how many tokens come to an expert is another number in each step.
        """
        if backend is not None and backend not in self.forms:
            self.forms[backend] = torch.compile(self.function, backend=backend, dynamic=True)
        self.compiled = None if backend is None else self.forms[backend]


@dataclass
class _Marked:
    """Every function that was marked, and with what those are compiled that will be."""

    functions: list[Pointwise[Any, Any]] = field(default_factory=list)
    backend: str | None = None


_MARKED = _Marked()


def pointwise(function: Callable[Arguments, Result]) -> Pointwise[Arguments, Result]:
    """Mark a function as one that may be fused."""
    return Pointwise(function)


def fuse(backend: str | None) -> None:
    """Compile every marked function with a backend of torch.compile from its next call on; None: none any more."""
    _MARKED.backend = backend
    for function in _MARKED.functions:
        function.use(backend)


@contextmanager
def fused(backend: str | None) -> Iterator[None]:
    """`fuse` inside of a with statement; afterwards it is as before."""
    before = _MARKED.backend
    fuse(backend)
    try:
        yield
    finally:
        fuse(before)
