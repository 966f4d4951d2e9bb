"""The law and its fit: known constants are found, as sure as it says, and what the points cannot carry is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling_samples import HELD_OUT, SCALES, SHAPES, TRUTH, grid, made

from moe_train.errors import DataError
from moe_train.observe.study.scaling.fit import covariance, fit_law, predict, split
from moe_train.observe.study.scaling.law import CONSTANTS, Law, Places

NOISE = 0.004


def at(parameters, tokens, expansion=1.0, granularity=1.0):
    return Places(*(np.array([float(value)]) for value in (parameters, tokens, expansion, granularity)))


@pytest.fixture(scope="module")
def noisy():
    """A fit to points that are off by 0.4 %, as runs of different seeds are."""
    return fit_law(grid(NOISE, draw=3), resamples=60)


def test_the_law_is_what_its_formula_says():
    loss = TRUTH.loss(at(300_000, 1_400_000, 4, 8))[0]
    exponent = 0.12 + 0.05 * np.log(8 / 2)
    assert loss == pytest.approx(1.2 + 0.35 * 2**-0.35 * 4**-exponent + 0.4 * 2**-0.5 * 4**0.04, rel=1e-12)


def test_granularity_means_nothing_in_a_dense_model():
    assert TRUTH.loss(at(1e5, 1e6, 1, 1)) == TRUTH.loss(at(1e5, 1e6, 1, 64))


@given(
    parameters=st.floats(1e4, 1e7), tokens=st.floats(1e5, 1e8), expansion=st.floats(1, 64), granularity=st.floats(1, 16)
)
def test_more_weights_and_more_text_never_hurt(parameters, tokens, expansion, granularity):
    loss = TRUTH.loss(at(parameters, tokens, expansion, granularity))[0]
    assert 1.2 < TRUTH.loss(at(2 * parameters, tokens, expansion, granularity))[0] < loss
    assert TRUTH.loss(at(parameters, 2 * tokens, expansion, granularity))[0] < loss


def test_slopes_are_those_of_finite_differences():
    places, step = at(60_000, 2_000_000, 8, 4), 1e-6
    for place in range(len(CONSTANTS)):
        moved = [TRUTH.vector.copy(), TRUTH.vector.copy()]
        moved[0][place] -= step
        moved[1][place] += step
        low, high = (Law(vector, SCALES).loss(places)[0] for vector in moved)
        assert TRUTH.slopes(places)[0, place] == pytest.approx((high - low) / (2 * step), rel=1e-6)


def test_points_on_a_law_give_the_law_back():
    fit = fit_law(grid(), resamples=1)
    assert fit.rms < 1e-8 and fit.free == CONSTANTS and fit.at_bound == ()
    assert predict(fit, HELD_OUT).loss == pytest.approx(HELD_OUT.loss, rel=1e-7)
    # The scales are the points' own, so that A and B differ; the exponents may not.
    for name in ("c", "alpha", "mu", "gamma", "beta", "omega"):
        assert fit.law.constants[name] == pytest.approx(TRUTH.constants[name], rel=1e-5), name


def test_noisy_points_give_intervals_that_hold_the_truth(noisy):
    for intervals in (noisy.bootstrap_intervals, noisy.jacobian_intervals):
        for name in ("c", "alpha", "mu", "gamma", "beta", "omega"):
            low, high = intervals[name]
            assert low < TRUTH.constants[name] < high, name
    assert noisy.rms == pytest.approx(NOISE, rel=0.3) and noisy.r_squared > 0.99


def test_both_kinds_of_interval_are_about_as_wide(noisy):
    for name in CONSTANTS:
        widths = [ends[name][1] - ends[name][0] for ends in (noisy.bootstrap_intervals, noisy.jacobian_intervals)]
        assert 0.4 < widths[0] / widths[1] < 2.5, name


def test_a_larger_run_is_predicted_within_the_interval_and_three_percent(noisy):
    told = predict(noisy, HELD_OUT)
    assert told.low < HELD_OUT.loss < told.high and told.low < told.loss < told.high
    assert told.loss == pytest.approx(HELD_OUT.loss, rel=0.03)


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    points = grid(NOISE)
    first, second, other = (fit_law(points, resamples=5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.resampled, second.resampled) and not np.array_equal(first.resampled, other.resampled)


def test_a_run_that_went_wrong_hardly_moves_the_law():
    points = grid(NOISE)
    points[20] = replace(points[20], loss=points[20].loss * 1.3)
    assert predict(fit_law(points, resamples=1), HELD_OUT).loss == pytest.approx(HELD_OUT.loss, rel=0.02)


@pytest.mark.parametrize(
    ("shapes", "absent"),
    [
        (((1, 1),), {"mu", "gamma", "omega"}),
        (((4, 2),), {"mu", "gamma", "omega"}),
        (((4, 2), (4, 8)), {"mu", "omega"}),
        (((1, 1), (4, 2), (8, 2)), {"gamma"}),
        (SHAPES, set()),
    ],
)
def test_what_does_not_vary_is_left_out_of_the_law(shapes, absent):
    fit = fit_law(grid(shapes=shapes), resamples=1)
    assert set(CONSTANTS) - set(fit.free) == absent
    assert all(fit.law.constants[name] == 0 for name in absent) and fit.rms < 1e-6
    assert fit.bootstrap_intervals.keys() == fit.jacobian_intervals.keys() == set(fit.free)


def test_too_few_and_too_similar_points_are_refused_at_once():
    with pytest.raises(DataError) as caught:
        fit_law([made(146_000, tokens, shape) for tokens in (300_000, 740_000) for shape in SHAPES[:3]])
    text = caught.value.report()
    assert "3 problems" in text
    assert "sizes of the model: 1 in" in text and "numbers of tokens: 2 in" in text
    assert "finished runs: 6 without" in text and "7 constants needs at least 11" in text


def test_as_many_points_as_asked_for_are_enough():
    points = grid(shapes=((1, 1),))
    assert len(points) == 9 and fit_law(points, resamples=1).rms < 1e-6
    with pytest.raises(DataError, match="8 without"):
        fit_law(points[:-1])


def test_the_runs_with_the_most_flops_are_held_out_and_limited_ones_are_in_neither_part():
    again = replace(HELD_OUT, seed=1)
    limited = made(990_000, 3_000_000, (4, 2), factor=1.0)
    fitted, heldout = split([*grid(), HELD_OUT, again, limited])
    assert heldout == [HELD_OUT, again] and fitted == grid()


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    inside = {"bootstrap": 0, "jacobian": 0, "prediction": 0}
    for draw in range(40):
        fit = fit_law(grid(NOISE, draw=100 + draw), resamples=80)
        for name, ends in (("bootstrap", fit.bootstrap_intervals), ("jacobian", fit.jacobian_intervals)):
            inside[name] += ends["alpha"][0] < TRUTH.constants["alpha"] < ends["alpha"][1]
        loss = HELD_OUT.loss * (1 + NOISE * np.random.default_rng(draw).normal())
        told = predict(fit, HELD_OUT)
        inside["prediction"] += told.low < loss < told.high
    assert all(count >= 33 for count in inside.values()), inside


def test_the_covariance_is_that_of_a_linear_model_where_the_law_is_linear():
    points = grid(NOISE)
    places = Places.of(points)
    residuals = np.full(len(points), NOISE)
    found = covariance(TRUTH, ("c",), places, residuals)
    slopes = 1 / TRUTH.loss(places)
    assert found[0, 0] == pytest.approx(NOISE**2 * len(points) / (len(points) - 1) / np.sum(slopes**2), rel=1e-9)
