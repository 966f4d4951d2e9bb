"""Decisions are made once, and handed out again in every later pass."""

import threading

import pytest
import torch

from moe_train.ops.keep import Tape, decide, is_kept


class Maker:
    """Counts how often something is decided."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> int:
        self.made += 1
        return self.made


def test_without_a_tape_everything_is_decided_when_it_is_asked_for() -> None:
    maker = Maker()
    assert [decide(maker), decide(maker)] == [1, 2]
    assert not is_kept()


def test_later_passes_get_the_same_objects_in_the_same_order() -> None:
    tape, maker = Tape(), Maker()
    with tape.recording():
        assert is_kept()
        first = [decide(lambda: torch.tensor(maker())) for _ in range(3)]
    assert not is_kept()
    again = tape.replaying()
    for _ in range(2):  # one context serves every later pass: a backward pass may come twice
        with again:
            assert is_kept()
            assert all(decide(lambda: torch.tensor(maker())) is kept for kept in first)
    assert maker.made == 3


def test_nothing_can_be_decided_twice() -> None:
    """None, False and empty tensors are decisions too."""
    tape = Tape()
    with tape.recording():
        assert [decide(lambda: None), decide(lambda: False), decide(lambda: 0)] == [None, False, 0]
    with tape.replaying():
        assert [decide(lambda: 7) for _ in range(3)] == [None, False, 0]


def test_a_pass_that_ends_early_leaves_nothing_behind() -> None:
    """Torch stops to recompute, by an exception, when it has what it needs."""
    tape, maker = Tape(), Maker()
    with tape.recording():
        decide(maker), decide(maker)
    for _ in range(2):
        with pytest.raises(KeyError), tape.replaying():
            assert decide(maker) == 1
            raise KeyError
        assert not is_kept()
    with tape.replaying():
        assert [decide(maker), decide(maker)] == [1, 2]


def test_a_later_pass_that_decides_more_is_refused() -> None:
    tape = Tape()
    with tape.recording():
        decide(lambda: 1)
    with tape.replaying():
        decide(lambda: 1)
        with pytest.raises(AssertionError, match="more often"):
            decide(lambda: 1)


def test_tapes_inside_of_one_another() -> None:
    outer, inner = Tape(), Tape()
    with outer.recording():
        decide(lambda: "outer")
        with inner.recording():
            decide(lambda: "inner")
        decide(lambda: "outer again")
    assert outer.decisions == ["outer", "outer again"]
    assert inner.decisions == ["inner"]


def test_a_tape_belongs_to_its_thread() -> None:
    """The backward pass computes again in a thread for each device."""
    tape, found = Tape(), []
    with tape.recording():
        thread = threading.Thread(target=lambda: found.append((is_kept(), decide(lambda: 5))))
        thread.start()
        thread.join()
    assert found == [(False, 5)]
    assert tape.decisions == []


@pytest.mark.parametrize("is_recorded", [False, True])
def test_decisions_have_no_gradient(is_recorded: bool) -> None:
    x = torch.ones(3, requires_grad=True)
    tape = Tape()
    if is_recorded:
        with tape.recording():
            decided = decide(lambda: x * 2)
    else:
        decided = decide(lambda: x * 2)
    assert not decided.requires_grad
    assert (x * 2).requires_grad
