"""Numbers of one fixture, computed by exact arithmetic outside this project from the formulas of the papers."""

import math

import pytest
import torch
from torch import nn

from moe_train.config.schema import DroplessConfig, TopKRouterConfig
from moe_train.moe.balance import RoutingRecord, balance_sum
from moe_train.moe.capacity import Capacity
from moe_train.moe.router import Routing, TopKRouter

LOGITS_TE = torch.tensor([[2, 1, 0, -1], [0, 1, 2, -1], [1, 1.5, 0, 0], [3, 0, 0, 0]], dtype=torch.float64)
SWITCH_LOSS = 1.4201107672254563
"""Switch Transformer, eq. 4 with alpha = 1: top-1."""
TOP_2_LOSS = 1.3085671449722773
"""The same for top-2, f a share of the assignments (1.0 when balanced), at the source's load: the second choice of row
3 is a tie, which torch.topk happened to give to expert 2."""
TOP_2_LOAD = [3, 3, 2, 0]
TOP_2_LOSS_LOWEST = 1.323711234823097
"""The same where the tie goes to the lowest index, expert 1: the rule of this project."""
Z_LOSS = 6.672129469334688
"""ST-MoE, eq. 5, unweighted."""
MIXTRAL_WEIGHTS = [0.7310585786300049, 0.2689414213699951]
"""Row 0: softmax over the two selected logits, 2 and 1: 1 / (1 + 1/e) and 1 / (1 + e)."""
SWITCH_WEIGHTS = [0.6439142599, 0.2368828181]
"""Row 0 without renormalisation, to the ten digits of the source."""


def route(top_k: int, normalize: str) -> Routing:
    """Route through a router whose weight is the identity, so that tokens are their own logits."""
    config = TopKRouterConfig.model_validate({"normalize": normalize})
    router = TopKRouter(4, 4, top_k, config, init_std=1.0)
    router.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
    routing: Routing = router(LOGITS_TE)
    return routing


def record_of(top_k: int) -> RoutingRecord:
    routing = route(top_k, "none")
    plan = Capacity(DroplessConfig(), 4, top_k).plan(routing, None, 4, training=True)
    return RoutingRecord.of(routing, plan, None, 4)


@pytest.mark.parametrize(("top_k", "expected"), [(1, SWITCH_LOSS), (2, TOP_2_LOSS_LOWEST)])
def test_load_balance_loss(top_k: int, expected: float) -> None:
    record = record_of(top_k)
    assert balance_sum(record.counts_E, record.probability_sum_E).item() / 4 == pytest.approx(expected, abs=1e-12)
    assert record.sequence_balance_sum.item() / 4 == pytest.approx(expected, abs=1e-12)


def test_load_balance_loss_at_a_given_load() -> None:
    probability_sum_E = record_of(2).probability_sum_E
    found = balance_sum(torch.tensor(TOP_2_LOAD), probability_sum_E).item() / 4
    assert found == pytest.approx(TOP_2_LOSS, abs=1e-12)


def test_z_loss() -> None:
    assert record_of(2).z_sum.item() / 4 == pytest.approx(Z_LOSS, abs=1e-12)


def test_mixtral_weights() -> None:
    assert route(2, "selected").weights_TK[0].tolist() == pytest.approx(MIXTRAL_WEIGHTS, abs=1e-12)
    assert MIXTRAL_WEIGHTS[0] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-15)


def test_switch_weights() -> None:
    assert route(2, "none").weights_TK[0].tolist() == pytest.approx(SWITCH_WEIGHTS, abs=1e-10)


@pytest.mark.parametrize(("experts", "expected"), [(8, 4.3241), (64, 17.2963), (128, 23.5422), (256, 30.7490)])
def test_z_loss_at_zero_logits(experts: int, expected: float) -> None:
    """(ln E)²: what a router that knows nothing pays."""
    assert torch.zeros(experts, dtype=torch.float64).logsumexp(0).square().item() == pytest.approx(expected, abs=5e-5)
