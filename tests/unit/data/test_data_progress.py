import io

from rich.console import Console

from moe_train.data import progress
from moe_train.data.progress import console_progress, no_progress


def shown(monkeypatch, terminal, advances, total=4 * 2**20, now=None):
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=100)
    monkeypatch.setattr(progress, "Console", lambda **settings: console)
    clock = iter(now or range(0, 1000, 6))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    with console_progress("encoding", total) as advance:
        for done in advances:
            advance(done)
    return buffer.getvalue()


def test_lines_without_a_terminal(monkeypatch):
    # one call of the clock every six seconds: every second one is due
    assert shown(monkeypatch, False, [2**20] * 4) == "encoding: 2.0 of 4.0 MiB\nencoding: 4.0 of 4.0 MiB\n"


def test_unknown_length(monkeypatch):
    assert shown(monkeypatch, False, [2**20] * 2, total=None) == "encoding: 2.0 MiB\n"


def test_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, True, [4 * 2**20])
    assert "encoding" in text and "4.2/4.2 MB" not in text and "4.0/4.0 MiB" in text


def test_nothing(capfd):
    with no_progress("encoding", 5) as advance:
        advance(5)
    assert capfd.readouterr() == ("", "")
