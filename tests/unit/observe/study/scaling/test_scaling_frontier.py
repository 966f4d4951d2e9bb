"""What a law says of budgets: the best size in closed form, experts and granularity, and the price of routers."""

import numpy as np
import pytest
from scaling_samples import SCALES, SHAPES, TRUTH, WIDTH, grid

from moe_train.observe.study.scaling.fit import Fit
from moe_train.observe.study.scaling.frontier import Costs, Frontier, octaves
from moe_train.observe.study.scaling.law import CONSTANTS, Law, Places


def frontier(points=None, **changes):
    """The frontier of the true law with some constants changed, as if it had been fitted."""
    vector = TRUTH.vector.copy()
    for name, value in changes.items():
        vector[CONSTANTS.index(name)] = value
    law = Law(vector, SCALES)
    points = points or grid(law=law)
    resampled = np.tile(vector, (3, 1))
    return Frontier.of(Fit(law, CONSTANTS, tuple(points), np.zeros(len(points)), resampled, np.eye(len(CONSTANTS))))


def test_costs_are_those_of_the_points():
    points = grid()
    costs, places = Costs.of(points), Places.of(points)
    found = costs.per_token(places.parameters, places.expansion, places.granularity)
    # A router costs as much in every size here, and the rest six FLOPs per parameter.
    assert found == pytest.approx(np.array([point.flops_per_token for point in points]), rel=1e-9)
    assert costs.router == pytest.approx((0.0, np.log(6.0 * WIDTH)), abs=1e-9)


def test_without_experts_there_are_no_routers_to_pay_for():
    assert Costs.of(grid(shapes=SHAPES[:1])).router is None


def test_the_best_size_is_that_of_the_closed_form():
    dense = frontier(grid(shapes=SHAPES[:1]))
    budget = 1e12
    # Hoffmann et al., eq. 4: for L = c + a N^-alpha + b D^-beta and budget = 6 N D.
    alpha, beta = 0.35, 0.5
    a, b = 0.35 * SCALES.parameters**alpha, 0.4 * SCALES.tokens**beta
    best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))
    curve = dense.curve(budget, (1.0, 1.0))
    step = curve.parameters[1] / curve.parameters[0]
    assert best / step < curve.parameters[curve.best] < best * step
    assert curve.tokens * curve.parameters * 6 == pytest.approx(np.full(len(curve.tokens), budget))


def test_a_curve_says_which_of_its_places_were_measured():
    found = frontier()
    curve = found.curve(5e11, (4.0, 2.0))
    inside = (curve.parameters >= 55_000) & (curve.parameters <= 350_000)
    inside &= (curve.tokens >= 300_000) & (curve.tokens <= 1_740_000)
    assert 0 < inside.sum() < len(inside) and np.array_equal(curve.is_measured, inside)


def test_experts_that_only_need_more_text_are_not_chosen():
    choice = frontier(mu=0.0, gamma=0.0, omega=0.2).choose(1e12)
    assert (choice.expansion, choice.granularity, choice.agreeing) == (1.0, 1.0, 1.0)


def test_experts_that_only_help_are_chosen_to_the_end_of_what_is_looked_at_and_it_is_said():
    choice = frontier(gamma=0.0, mu=0.5, omega=0.0).choose(1e12)
    assert choice.expansion == 16 and "E" in choice.beyond
    # Finer experts bring nothing here and their router costs: the coarsest that is looked at, also not measured.
    assert choice.granularity == 1 and "G" in choice.beyond


def test_a_law_that_cannot_tell_experts_apart_chooses_among_what_was_measured():
    points = grid(shapes=((4, 2),))
    free = ("c", "A", "alpha", "B", "beta")
    fit = Fit(TRUTH, free, tuple(points), np.zeros(len(points)), TRUTH.vector[None], np.eye(len(free)))
    assert Frontier.of(fit).shapes == [(4.0, 2.0)]


def test_a_dense_model_that_was_never_trained_is_a_guess():
    choice = frontier(grid(shapes=((2, 2), (4, 2))), mu=-0.5, gamma=0.0).choose(1e12)
    assert choice.expansion == 1 and "E" in choice.beyond


def test_routers_bound_granularity():
    cheap, dear = frontier(), frontier()
    dear.__dict__["costs"] = Costs(dear.costs.dense, (0.0, dear.costs.router[1] + np.log(30)))
    assert dear.choose(1e12).granularity < cheap.choose(1e12).granularity


def test_resamples_that_disagree_are_counted():
    found = frontier()
    vectors = found.fit.resampled
    vectors[0, CONSTANTS.index("mu")] = vectors[0, CONSTANTS.index("gamma")] = 0.0  # here experts only cost
    choice = found.choose(1e12)
    assert choice.expansion > 1 and choice.agreeing == pytest.approx(2 / 3) and choice.low <= choice.loss <= choice.high


def test_budgets_span_the_runs_and_the_usual_shape_is_the_most_frequent():
    found = frontier()
    flops = [point.training_flops for point in found.fit.points]
    assert found.budgets[0] == pytest.approx(min(flops)) and found.budgets[-1] == pytest.approx(max(flops))
    points = [*grid(), *grid(shapes=((8, 2),))]
    assert frontier(points).usual_shape == (8, 2)
    assert frontier(grid(shapes=SHAPES[:1])).usual_shape == (1.0, 1.0)


def test_what_is_looked_at_goes_an_octave_beyond_and_not_below_one():
    assert octaves([2.0, 8.0]) == [1.0, 2.0, 8.0, 16.0] and octaves([1.0]) == [1.0, 2.0] and octaves([]) == []
