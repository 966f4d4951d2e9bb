"""How often an agent is asked again, after which wait, and that nothing waits for ever."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.agents.agent import AgentError, Answer
from moe_train.agents.endpoint import seconds_of
from moe_train.agents.patience import LONGEST_BACKOFF_S, Patience, within


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now_s = 0.0
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds


def persist(faults, retries=3, backoff_s=1.0, total_s=1000.0, draw=lambda: 1.0):
    """Run attempts that fail as told, then one that does not; return what is known afterwards."""
    clock, told, left = Clock(), [], []

    def attempt(left_s):
        left.append(left_s)
        if len(left) <= len(faults):
            raise faults[len(left) - 1]
        return Answer("fine")

    patience = Patience(retries, backoff_s, total_s, lambda: clock.now_s, clock.sleep, draw)
    try:
        outcome = patience.persist(attempt, told.append)
    except AgentError as error:
        outcome = error
    return outcome, clock.slept, told, left


def passing(wait_s=0.0):
    return AgentError("busy", is_passing=True, wait_s=wait_s)


def test_waits_double_up_to_a_bound():
    outcome, slept, told, _ = persist([passing()] * 8, retries=8)
    assert outcome == Answer("fine")
    assert slept == [1.0, 2.0, 4.0, 8.0, 16.0, *[LONGEST_BACKOFF_S] * 3]
    assert [attempt.fault for attempt in told] == ["busy"] * 8 + [None]


def test_chance_shortens_a_wait_to_half_at_most():
    _, slept, _, _ = persist([passing()] * 3, draw=lambda: 0.0)
    assert slept == [0.5, 1.0, 2.0]
    _, slept, _, _ = persist([passing()] * 3, draw=random.Random(0).random)
    assert all(wait / 2 <= found <= wait for found, wait in zip(slept, [1, 2, 4], strict=True))


def test_attempts_are_counted():
    outcome, slept, told, left = persist([passing()] * 9, retries=2)
    assert isinstance(outcome, AgentError) and len(left) == len(told) == 3 and len(slept) == 2


def test_a_final_fault_is_final():
    outcome, slept, told, left = persist([AgentError("no such model")])
    assert str(outcome) == "no such model" and slept == [] and len(told) == len(left) == 1


def test_a_wait_that_was_asked_for_is_the_least():
    _, slept, _, _ = persist([passing(wait_s=7.0), passing(wait_s=0.1)])
    assert slept == [7.0, 2.0]


def test_a_wait_beyond_the_time_that_is_left_is_not_begun():
    outcome, slept, _, _ = persist([passing(wait_s=3600.0)], total_s=60.0)
    assert isinstance(outcome, AgentError) and slept == []
    _, slept, _, left = persist([passing()] * 9, retries=9, total_s=5.0)
    assert slept == [1.0, 2.0] and left == [5.0, 4.0, 2.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.0, 50.0), max_size=6), st.integers(0, 6), st.floats(0.1, 100.0))
def test_a_call_never_sleeps_longer_than_its_time(waits, retries, total_s):
    _, slept, told, left = persist([passing(wait) for wait in waits], retries, total_s=total_s)
    assert sum(slept) < total_s or not slept
    assert len(told) == len(left) <= retries + 1 and all(seconds > 0 for seconds in left)


def test_late_work_is_given_up():
    given_up = []
    start_s = time.monotonic()
    with pytest.raises(AgentError, match=r"no answer in 0.05 s") as caught:
        within(0.05, lambda: time.sleep(5.0), lambda: given_up.append(True))
    assert time.monotonic() - start_s < 2.0 and given_up == [True] and caught.value.is_passing


def test_work_in_time_returns_or_raises():
    assert within(5.0, lambda: 3, lambda: pytest.fail("not late")) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0, lambda: pytest.fail("not late"))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), (" 7 ", 7.0), ("Wed, 21 Oct 2015 07:28:10 GMT", 10.0), ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
     ("Wed, 21 Oct 2015 07:28:10 -0000", 10.0), ("soon", 0.0), ("-5", 0.0), ("", 0.0)],
)  # fmt: skip
def test_retry_after(header, seconds):
    at_7_28 = 1445412480.0
    assert seconds_of(header, lambda: at_7_28) == seconds
