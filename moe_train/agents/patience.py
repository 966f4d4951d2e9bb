"""Attempts, waits between them, and an end to both."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from moe_train.agents.agent import AgentError, Answer, Attempt, Tell

Value = TypeVar("Value")
LONGEST_BACKOFF_S = 30.0
"""Waits are not doubled beyond this, in seconds."""


@dataclass(frozen=True)
class Patience:
    """How often and how long a call is tried.

    Attributes:
        retries: attempts after the first.
        backoff_s: wait before the second attempt, in seconds.
        total_s: longest time of all attempts and waits, in seconds.
        clock: tells the time, in seconds.
        sleep: waits, in seconds.
        draw: a number in [0, 1) by chance.
    """

    retries: int
    backoff_s: float
    total_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep
    draw: Callable[[], float] = random.random

    def persist(self, attempt: Callable[[float], Answer], tell: Tell) -> Answer:
        """Return the first answer.

        Args:
            attempt: gets the seconds that are left for it.
            tell: gets each attempt.

        Raises:
            AgentError: the last one, when it is final, or attempts or time are used up.
        """
        start_s = self.clock()
        for number in range(self.retries + 1):
            begun_s = self.clock()
            try:
                answer = attempt(self.total_s - (begun_s - start_s))
            except AgentError as error:
                now_s = self.clock()
                wait_s = self._wait_after(number, error, self.total_s - (now_s - start_s))
                tell(Attempt(now_s - begun_s, str(error), wait_s or 0.0))
                if wait_s is None:
                    raise
                self.sleep(wait_s)
            else:
                tell(Attempt(self.clock() - begun_s))
                return answer
        raise AssertionError("the last attempt returns or raises")

    def _wait_after(self, number: int, error: AgentError, left_s: float) -> float | None:
        """Return the wait before the next attempt, in seconds; None: there is none."""
        if not error.is_passing or number == self.retries:
            return None
        # Half of it by chance: those who were refused together do not come back together.
        backoff_s = min(self.backoff_s * 2.0**number, LONGEST_BACKOFF_S) * (0.5 + self.draw() / 2)
        wait_s = max(backoff_s, error.wait_s)
        return wait_s if wait_s < left_s else None


def within(seconds: float, work: Callable[[], Value], give_up: Callable[[], object]) -> Value:
    """Return what ``work`` returns, if it does so in time.

    Timeouts of a socket are per read: a name server that is silent, or a peer that sends a byte now and then, would
    hold its caller for ever. So the work has a thread of its own, which is left behind when it is late.

    Args:
        seconds: that it has.
        work: what to do.
        give_up: called when it is late; should make it end soon.

    Raises:
        AgentError: it is late; passing.
    """
    values: list[Value] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="attempt", daemon=True)
    thread.start()
    thread.join(seconds)
    if values:
        return values[0]
    if errors:
        raise errors[0]
    give_up()
    raise AgentError(f"no answer in {seconds:.3g} s", is_passing=True)
