"""Running figures of a training that need no tensors: rates, averages, memory of the process."""

from __future__ import annotations

import resource
import sys

BYTES_PER_GIB = 1024**3


class Ema:
    """Exponential moving average without a start-up bias (Adam's correction: Kingma and Ba 2015, algorithm 1).

    Args:
        decay: weight of the past, 0 to 1; 0.9 remembers about ten values.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = 0.0
        self._weight = 0.0

    def update(self, value: float) -> float:
        """Take in ``value`` and return the average so far, in the same unit."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight


class RateMeter:
    """Smoothed rate of work: decayed amount over decayed time, so that a long interval counts for its length.

    Args:
        warmup: first updates that are left out, because they hold compilation, allocation and cold caches.
        decay: weight of the past, 0 to 1.
    """

    def __init__(self, warmup: int, decay: float) -> None:
        self._warmup = warmup
        self._decay = decay
        self._amount = 0.0
        self._seconds = 0.0

    def update(self, amount: float, seconds: float) -> None:
        """Take in ``amount`` of work (tokens, steps, ...) that took ``seconds``; a clock set back counts as zero."""
        if self._warmup > 0:
            self._warmup -= 1
            return
        self._amount = self._decay * self._amount + amount
        self._seconds = self._decay * self._seconds + max(seconds, 0.0)

    @property
    def per_second(self) -> float | None:
        """Work per second; None during warm-up."""
        return self._amount / self._seconds if self._seconds > 0 else None

    def seconds_for(self, amount: float) -> float | None:
        """Return how long ``amount`` of work will take at this rate, in seconds; None while there is no rate."""
        rate = self.per_second
        return amount / rate if rate else None


def peak_memory_gib() -> float:
    """Return the largest resident memory this process has had so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return peak * bytes_per_unit / BYTES_PER_GIB
