"""Expected drop rates of uniform independent top-1 routing at capacity ceil(T / E · factor): exact for a binomial load.

The table is that of the reference sheet (section 5.3), computed there in exact arithmetic.
"""

import math

import pytest
import torch
from torch import Tensor

from moe_train.config.routing import FactorCapacityConfig
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.routing import Routing

FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0)
TABLE = {
    (1024, 64): ("9.844", "5.007", "2.242", "0.305", "0.001"),
    (4096, 64): ("4.941", "1.342", "0.127", "0.0003", "0.0000"),
    (512, 8): ("4.659", "1.142", "0.084", "0.0001", "0.0000"),
    (65536, 64): ("1.237", "0.0006", "0.0000", "0.0000", "0.0000"),
}
"""Per cent of the assignments, by tokens and experts, at each factor; to the digits given."""
CASES = [(*size, factor, rate) for size, rates in TABLE.items() for factor, rate in zip(FACTORS, rates, strict=True)]


def half_a_digit(printed: str) -> float:
    """How far the printed number may be from what it stands for."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def exact_rate(tokens: int, experts: int, capacity: int) -> float:
    """E[max(load - capacity, 0)] / (T / E), the load of an expert being binomial; in per cent."""
    log_p, log_q = math.log(1 / experts), math.log1p(-1 / experts)
    lost = 0.0
    for load in range(capacity + 1, tokens + 1):
        ways = math.lgamma(tokens + 1) - math.lgamma(load + 1) - math.lgamma(tokens - load + 1)
        lost += (load - capacity) * math.exp(ways + load * log_p + (tokens - load) * log_q)
    return 100 * lost * experts / tokens


def routing_to(experts_T1: Tensor, num_experts: int) -> Routing:
    """Choices without scores: the policy ``position`` looks at nothing else."""
    scores_TE = torch.zeros(1, num_experts).expand(len(experts_T1), num_experts)
    weights_T1 = torch.ones(experts_T1.shape)
    return Routing(scores_TE, scores_TE, scores_TE, experts_T1, weights_T1, lambda _: weights_T1)


def simulated_rates(tokens: int, experts: int, factor: float, batches: int) -> Tensor:
    """Drop rate of each of several batches, in per cent; a batch is a sequence and so has a capacity of its own."""
    generator = torch.Generator().manual_seed(tokens + experts)
    experts_T1 = torch.randint(experts, (batches * tokens, 1), generator=generator)
    context = RoutingContext.of(torch.zeros(batches, tokens, dtype=torch.int64))
    capacity = Capacity(FactorCapacityConfig(factor=factor), experts, top_k=1)
    kept_BS = capacity.plan(routing_to(experts_T1, experts), context, training=True).kept_TK.view(batches, tokens)
    return 100 * (~kept_BS).to(torch.float64).mean(dim=1)


@pytest.mark.parametrize(("tokens", "experts", "factor", "rate"), CASES)
def test_the_table_is_what_a_binomial_load_loses(tokens: int, experts: int, factor: float, rate: str) -> None:
    assert abs(exact_rate(tokens, experts, math.ceil(factor * tokens / experts)) - float(rate)) <= half_a_digit(rate)


@pytest.mark.parametrize(("tokens", "experts", "factor", "rate"), CASES)
def test_simulated_drops_are_within_three_sigma_of_the_table(
    tokens: int, experts: int, factor: float, rate: str
) -> None:
    batches = max(8, 262_144 // tokens)
    rates, expected = simulated_rates(tokens, experts, factor, batches), float(rate)
    # Where drops are so rare that a sample may have none, their number is at least as uncertain as Poisson's.
    rare = 100 * (expected / 100 / (batches * tokens)) ** 0.5
    sigma = max(rates.std().item() / batches**0.5, rare)
    assert abs(rates.mean().item() - expected) <= 3 * sigma + half_a_digit(rate)


def test_the_rate_at_factor_one_nears_one_over_the_root_of_two_pi_mean() -> None:
    assert abs(exact_rate(65536, 64, 1024) / 100 * math.sqrt(2 * math.pi * 1024) - 1) < 0.01
