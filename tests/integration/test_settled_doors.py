"""Every command that computes sets the settings of its process, by its own name, before anything slow is imported."""

from __future__ import annotations

import runpy
import sys

import pytest

from moe_train.config import process

DOORS = ("train", "evaluate", "generate", "bench", "agents.__main__")


class StartedAnewError(Exception):
    """What stands for a process that is started anew."""


@pytest.mark.parametrize("name", DOORS)
def test_a_door_is_settled_by_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`settle` starts nothing anew unless it is given the name that Python was started with."""
    asked: list[str] = []

    def settle(module: str) -> None:
        asked.append(module)
        raise StartedAnewError

    monkeypatch.setattr(process, "settle", settle)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.delitem(sys.modules, f"moe_train.{name}", raising=False)
    with pytest.raises(StartedAnewError):
        runpy.run_module(f"moe_train.{name}", run_name="__main__")
    assert asked == [f"moe_train.{name}"]
