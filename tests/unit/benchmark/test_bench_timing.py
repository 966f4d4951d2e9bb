"""Timing: orders, ratios, failures, with variants of known times."""

from __future__ import annotations

import sys
import time

import pytest
from bench_samples import Fails, Pretended
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.benchmark.timing import Here, Times, VariantError, interleave, measure, turned


class Noted:
    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def run_ms(self) -> float:
        self.order.append(self.name)
        return 1.0


def test_warm_up_does_not_count() -> None:
    times = interleave({"a": Pretended(100.0, 50.0, 1.0, 3.0, 2.0)}, rounds=3, warmup=2)
    assert times["a"].ms == (1.0, 3.0, 2.0)
    assert times["a"].median_ms == 2.0


def test_the_order_turns_so_that_each_is_first_equally_often() -> None:
    order: list[str] = []
    interleave({name: Noted(name, order) for name in "abc"}, rounds=2, warmup=1)
    assert "".join(order) == "abcbcacab"


@settings(deadline=None, max_examples=20)
@given(st.lists(st.text(max_size=2), unique=True, max_size=6), st.integers(0, 50))
def test_every_round_has_every_variant(names: list[str], turn: int) -> None:
    order = turned(names, turn)
    assert sorted(order) == sorted(names)
    assert not names or order[0] == names[turn % len(names)]


def test_ratios_are_of_rounds_so_that_what_slows_a_round_slows_both() -> None:
    mine, base = Times((2.0, 20.0, 4.0)), Times((1.0, 10.0, 1.0))
    ratio = mine.ratio_to(base)
    assert ratio.of_rounds == (0.5, 0.5, 0.25)
    assert ratio.median == 0.5
    assert str(ratio) == "0.50 (0.25 to 0.50)"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9), st.floats(0.1, 10.0))
def test_identical_variants_have_ratio_one_and_faster_ones_more(ms: list[float], factor: float) -> None:
    base = Times(tuple(ms))
    assert base.ratio_to(Times(tuple(ms))).of_rounds == (1.0,) * len(ms)
    quicker = Times(tuple(value / factor for value in ms)).ratio_to(base)
    assert quicker.median == pytest.approx(factor)


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Times((1.0, 2.0)).ratio_to(Times((1.0,)))


def test_a_failing_variant_is_told_and_the_others_go_on() -> None:
    broken = Fails(good_runs=1)
    measured = measure({"good": Pretended(1.0), "broken": broken, "late": Pretended(2.0)}, rounds=3, warmup=1)
    assert measured.failures == {"broken": "it broke"}
    assert {name: times.ms for name, times in measured.times.items()} == {"good": (1.0,) * 3, "late": (2.0,) * 3}
    assert broken.good_runs == -1, "it is not tried again"


def test_all_may_fail() -> None:
    measured = measure({"a": Fails(), "b": Fails()}, rounds=2, warmup=0)
    assert not measured.times
    assert set(measured.failures) == {"a", "b"}


def test_interleave_names_all_that_failed() -> None:
    with pytest.raises(VariantError, match="a: it broke; b: it broke"):
        interleave({"a": Fails(), "b": Fails(), "c": Pretended(1.0)}, rounds=1, warmup=0)


def test_here_measures_milliseconds() -> None:
    assert 20.0 <= Here(lambda: time.sleep(0.02)).run_ms() < 2000.0


def test_it_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"a": Here(lambda: None), "b": Here(lambda: None)}
    interleave(variants, 2, 1)
    assert capsys.readouterr().err == "timing 2 variants in 3 rounds\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    interleave(variants, 2, 1)
    assert capsys.readouterr().err.split("\r")[1:] == [
        *(f"round {turn} of 3, 2 variants " for turn in (1, 2)),
        "round 3 of 3, 2 variants \n",
    ]
