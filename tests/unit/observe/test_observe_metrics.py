import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.observe.metrics import Ema, RateMeter, peak_memory_gib


def test_ema_starts_at_the_first_value_and_forgets():
    ema = Ema(decay=0.9)
    assert ema.update(5.0) == pytest.approx(5.0)
    assert ema.update(3.0) == pytest.approx((0.09 * 5 + 0.1 * 3) / 0.19)
    for _ in range(300):
        last = ema.update(1.0)
    assert last == pytest.approx(1.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(0.0, 0.99))
def test_ema_stays_within_its_values(values, decay):
    ema = Ema(decay)
    for value in values:
        average = ema.update(value)
    assert min(values) - 1e-6 <= average <= max(values) + 1e-6


def test_warmup_is_left_out_of_rate_and_time_left():
    meter = RateMeter(warmup=2, decay=0.9)
    for _ in range(2):
        meter.update(100, seconds=50.0)
        assert meter.per_second is None and meter.seconds_for(10) is None
    meter.update(100, seconds=2.0)
    assert meter.per_second == pytest.approx(50.0)
    assert meter.seconds_for(200) == pytest.approx(4.0)


def test_rate_weighs_intervals_by_their_length():
    meter = RateMeter(warmup=0, decay=1.0)
    meter.update(100, seconds=1.0)
    meter.update(100, seconds=3.0)
    assert meter.per_second == pytest.approx(50.0)  # a mean of the rates would say 66.7


def test_a_clock_set_back_gives_no_negative_rate():
    meter = RateMeter(warmup=0, decay=0.5)
    meter.update(100, seconds=-5.0)
    assert meter.per_second is None
    meter.update(100, seconds=1.0)
    assert meter.per_second is not None and meter.per_second > 0


def test_no_work_left_takes_no_time():
    meter = RateMeter(warmup=0, decay=0.5)
    meter.update(10, seconds=1.0)
    assert meter.seconds_for(0) == 0.0


def test_peak_memory_counts_what_was_allocated():
    before = peak_memory_gib()
    block = bytearray(64 * 1024**2)
    block[::4096] = b"x" * len(block[::4096])
    after = peak_memory_gib()
    assert 0.01 < before <= after < 64
    assert after >= 0.0625


def test_a_trainer_that_imports_the_sinks_and_the_report_starts_fast():
    code = (
        "import sys, moe_train.observe.sinks, moe_train.observe.report, moe_train.observe.environment;"
        "heavy = {'torch', 'matplotlib', 'wandb', 'rich'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
