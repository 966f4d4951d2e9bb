"""Decisions that stay: made once in a forward pass, and not again where the backward pass computes it a second time.

What routing and capacity decide, and what ranks agree on, are integers and booleans that hang on the last bits of
floating-point numbers. Computed again, such a number may be another (atomic additions, another kernel, a weight that
moved), and a token would pass backwards through an expert that it never visited. So `decide` hands the first result
out again, and the work that led to it, collectives and waits for the device included, is done once only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar, cast

import torch

Decision = TypeVar("Decision")


@dataclass
class Tape:
    """The decisions of a region that is computed again, in the order in which they were made.

    Attributes:
        decisions: of the first pass.
    """

    decisions: list[object] = field(default_factory=list)

    def recording(self) -> AbstractContextManager[None]:
        """Return what surrounds the first pass: decisions are made, and kept."""
        return _Pass(self, is_first=True)

    def replaying(self) -> AbstractContextManager[None]:
        """Return what surrounds each later pass: the same decisions in the same order. A pass may end early."""
        return _Pass(self, is_first=False)


class _Pass(AbstractContextManager[None]):
    """One pass after the other through a region; unlike a generator's, this context may be entered again."""

    def __init__(self, tape: Tape, is_first: bool) -> None:
        self.tape = tape
        self.is_first = is_first
        self.remaining: Iterator[object] = iter(())
        self.token: Token[_Pass | None] | None = None

    def __enter__(self) -> None:
        self.remaining = iter(self.tape.decisions)
        self.token = _RUNNING.set(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.token is not None, "a pass ends that did not begin"
        _RUNNING.reset(self.token)

    def next(self, make: Callable[[], object]) -> object:
        """Return the next decision."""
        if self.is_first:
            self.tape.decisions.append(make())
            return self.tape.decisions[-1]
        for decision in self.remaining:
            return decision
        raise AssertionError("a later pass decides more often than the first: its path hangs on what is not kept")


# Of a thread, not of the process: the backward pass has a thread for each device, in which it computes again.
_RUNNING: ContextVar[_Pass | None] = ContextVar("running pass", default=None)


def is_kept() -> bool:
    """Return whether decisions are being kept or handed out again: an outer region is one that is computed again."""
    return _RUNNING.get() is not None


@torch.no_grad()
def decide(make: Callable[[], Decision]) -> Decision:
    """Return what ``make`` decides; where the backward pass computes again, what it decided the first time.

    Args:
        make: gives integers, booleans, or what is made of them (tensors, structures of them, numbers), never anything
            that needs a gradient: it runs without. All ranks of a group whose collectives it calls keep decisions
            alike.
    """
    running = _RUNNING.get()
    return make() if running is None else cast(Decision, running.next(make))
