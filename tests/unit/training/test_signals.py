"""A polite end: the first signal is noted, a second interrupt ends at once, handlers come back."""

import os
import signal

import pytest

from moe_train.training.signals import StopRequest, stop_launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted(number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
    assert signal.getsignal(number) is previous


def test_a_second_interrupt_ends_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_a_second_termination_still_lets_the_step_finish() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM, "the first"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What this process sends to others, instead of sending it."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


@pytest.mark.parametrize(("rank", "asked"), [("0", True), ("1", False)])
def test_one_rank_per_machine_stops_its_launcher(
    rank: str, asked: bool, sent: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "moe_train")
    monkeypatch.setenv("LOCAL_RANK", rank)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        stop_launcher()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert sent == ([(os.getppid(), signal.SIGTERM)] if asked else [])


def test_without_torchrun_nobody_is_signalled(sent: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop_launcher()
    assert sent == []
