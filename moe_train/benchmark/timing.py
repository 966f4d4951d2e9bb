"""Timing: every variant once per round, in an order that turns, so that no variant has the quiet moments to itself."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Timed(Protocol):
    """Something that can be run once and timed."""

    def run_ms(self) -> float:
        """Run once; return how long it took, in milliseconds."""


@dataclass(frozen=True)
class Here:
    """A variant in this process.

    Attributes:
        work: what is timed; inputs and gradients are made before.
        device: whose work is waited for, before and after.
    """

    work: Callable[[], object]
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    def run_ms(self) -> float:
        """Run once."""
        self._wait()
        start_s = time.perf_counter()
        self.work()
        self._wait()
        return (time.perf_counter() - start_s) * 1e3

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True)
class Times:
    """What was measured of one variant.

    Attributes:
        ms: of each round, in order.
    """

    ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle one."""
        return statistics.median(self.ms)

    def ratio_to(self, other: Times) -> Ratio:
        """Return this variant's speed relative to another's, round by round: what slows a round slows both."""
        return Ratio(tuple(b / a for a, b in zip(self.ms, other.ms, strict=True)))


@dataclass(frozen=True)
class Ratio:
    """Speeds relative to another variant's, one per round; above 1 is faster.

    Attributes:
        of_rounds: in order.
    """

    of_rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.of_rounds)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.of_rounds):.2f} to {max(self.of_rounds):.2f})"


@dataclass(frozen=True)
class Measured:
    """What was measured of several variants.

    Attributes:
        times: of those that ran in every round, by name.
        failures: what went wrong with the others, by name.
    """

    times: dict[str, Times]
    failures: dict[str, str]


class VariantError(RuntimeError):
    """A variant could not be run; the message names it and says why."""


def measure(variants: Mapping[str, Timed], rounds: int, warmup: int) -> Measured:
    """Time all variants; one that fails is told and left out from then on, the others are timed to the end.

    Args:
        variants: by name; each is run ``warmup + rounds`` times.
        rounds: that count.
        warmup: rounds before them.
    """
    going = list(variants)
    measured: dict[str, list[float]] = {name: [] for name in going}
    failures: dict[str, str] = {}
    for turn in range(warmup + rounds):
        tell(turn + 1, warmup + rounds, len(going))
        for name in turned(going, turn):
            try:
                ms = variants[name].run_ms()
            except Exception as error:
                failures[name] = last_line(str(error)) or type(error).__name__
                continue
            if turn >= warmup:
                measured[name].append(ms)
        going = [name for name in going if name not in failures]
    return Measured({name: Times(tuple(measured[name])) for name in going}, failures)


def interleave(variants: Mapping[str, Timed], rounds: int, warmup: int) -> dict[str, Times]:
    """Time all variants, as `measure` does.

    Raises:
        VariantError: one of them failed; all that failed are named.
    """
    measured = measure(variants, rounds, warmup)
    if measured.failures:
        raise VariantError("; ".join(f"{name}: {why}" for name, why in measured.failures.items()))
    return measured.times


def tell(turn: int, turns: int, variants: int) -> None:
    """Say how far it is: each round in the same line of a terminal, elsewhere the first one only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\rround {turn} of {turns}, {variants} variants " + ("\n" if turn == turns else ""))
    elif turn == 1:
        sys.stderr.write(f"timing {variants} variants in {turns} rounds\n")
    sys.stderr.flush()


def turned(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of a round: each variant is the first, and the last, equally often."""
    first = turn % len(names) if names else 0
    return [*names[first:], *names[:first]]


def last_line(text: str) -> str:
    """Return the last line of what a process told, or nothing."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
