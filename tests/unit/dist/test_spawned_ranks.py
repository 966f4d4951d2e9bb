"""The helper that starts ranks for tests: what goes to them and what comes back."""

import os
import sys

import pytest
import torch
from spawn import run_ranks


def speak(world):
    print("aloud", world.rank)
    sys.stderr.write("aside\n")
    os.write(2, b"below\n")


def test_what_ranks_say_is_heard_by_the_test_that_started_them(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(speak, 2)
    said = capfd.readouterr().out
    assert [said.count(words) for words in ("aloud 0", "aloud 1", "aside", "below")] == [1, 1, 2, 2]


def total(world, tensors):
    return sum(float(tensor) for tensor in tensors)


def test_hundreds_of_tensors_go_to_the_ranks() -> None:
    """As arguments of a process each was a file descriptor: "too many fds"."""
    assert run_ranks(total, 2, [torch.tensor(float(number)) for number in range(300)]) == [44850.0, 44850.0]


def variable(world):
    return os.environ["SAID_TO_RANKS"]


@pytest.mark.parametrize("value", ["first", "second"])
def test_variables_are_those_of_the_moment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAID_TO_RANKS", value)
    assert run_ranks(variable, 2) == [value, value]
