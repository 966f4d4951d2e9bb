"""Drops of even choices in closed form, and which runs a sweep of capacity factors is made of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling_samples import grid, made

from moe_train.observe.study.scaling.capacity import capacity_sweep, uniform_drop_rate


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "percent"),
    [
        (1024, 64, 1.0, 9.844),
        (1024, 64, 1.1, 5.007),
        (1024, 64, 1.25, 2.242),
        (1024, 64, 1.5, 0.305),
        (4096, 64, 1.0, 4.941),
        (4096, 64, 1.25, 0.127),
        (512, 8, 1.0, 4.659),
        (512, 8, 1.1, 1.142),
    ],
)
def test_the_closed_form_is_the_known_table(tokens, experts, factor, percent):
    assert 100 * uniform_drop_rate(factor, tokens, experts, top_k=1) == pytest.approx(percent, abs=6e-4)


def test_the_closed_form_is_what_a_simulation_drops():
    random = np.random.default_rng(0)
    tokens, experts, top_k, factor = 128, 8, 2, 1.0
    loads = np.array(
        [
            np.bincount(np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].ravel(), minlength=experts)
            for _ in range(400)
        ]
    )
    dropped = np.maximum(loads - tokens * top_k / experts * factor, 0).sum(axis=1) / (tokens * top_k)
    error = dropped.std() / np.sqrt(len(dropped))
    assert uniform_drop_rate(factor, tokens, experts, top_k) == pytest.approx(dropped.mean(), abs=4 * error)


@given(factor=st.floats(0.1, 3.0), tokens=st.integers(8, 200), experts=st.sampled_from([2, 4, 16]))
def test_a_larger_factor_never_drops_more(factor, tokens, experts):
    less = uniform_drop_rate(factor * 1.2, tokens, experts, 1)
    assert 0 <= less <= uniform_drop_rate(factor, tokens, experts, 1) <= 1
    assert uniform_drop_rate(float(experts), tokens, experts, 1) == 0


def test_a_sweep_is_of_one_model_with_its_unlimited_runs():
    factors = (2.0, 0.5, 1.0)
    limited = [made(146_000, 740_000, (4, 2), factor=factor) for factor in factors]
    stranger = made(55_000, 740_000, (4, 2), factor=1.0)
    sweep = capacity_sweep([*grid(), *limited, stranger])
    assert [point.capacity_factor for point in sweep.limited] == [0.5, 1.0, 2.0]
    assert sweep.unlimited == (made(146_000, 740_000, (4, 2)),)


def test_without_a_limit_there_is_no_sweep():
    assert capacity_sweep(grid()) is None
