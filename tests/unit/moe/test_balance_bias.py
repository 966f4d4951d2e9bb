"""The bias of loss-free balancing: which way it moves, when, and what it must not depend on."""

import pytest
import torch
from moe_samples import make_layer, tokens
from routing_cases import EXPERTS, context_of, ffn_of, random, router_of

from moe_train.moe.balance import Balance
from moe_train.moe.routers import build_router


def layer_of(update: str = "sign", rate: float = 0.25) -> Balance:
    return Balance(ffn_of("sigmoid", 4, 2, {"loss_free": {"update": update, "rate": rate}}))


def test_experts_below_the_mean_gain_and_those_above_lose() -> None:
    """b += rate · sign(mean(c) - c); a published summary prints the opposite sign."""
    assert layer_of().bias_change(torch.tensor([9, 1, 4, 2])).tolist() == [-0.25, 0.25, 0.0, 0.25]


def test_by_size_of_the_error_relative_to_the_mean() -> None:
    assert layer_of("error").bias_change(torch.tensor([9, 1, 4, 2])).tolist() == [-0.3125, 0.1875, 0.0, 0.125]


@pytest.mark.parametrize("update", ["sign", "error"])
def test_balanced_load_and_no_load_move_nothing(update: str) -> None:
    for counts_E in (torch.full((4,), 7), torch.zeros(4, dtype=torch.int64)):
        assert layer_of(update).bias_change(counts_E).tolist() == [0.0] * 4


def test_the_mean_is_exact_for_large_counts() -> None:
    """In fp32 these counts are their mean."""
    counts_E = torch.tensor([2**40, 2**40 + 1, 2**40, 2**40 - 1])
    assert layer_of().bias_change(counts_E).tolist() == [0.0, -0.25, 0.0, 0.25]


def test_trap_16_the_update_is_from_the_counts_of_all_parts_not_from_each() -> None:
    """Three parts whose own updates would add up to another one."""
    parts = [torch.tensor([8, 0, 0, 0]), torch.tensor([0, 3, 3, 2]), torch.tensor([0, 3, 3, 2])]
    together = layer_of().bias_change(sum(parts))
    assert together.tolist() == [-0.25, 0.0, 0.0, 0.25]
    assert not torch.equal(together, sum(layer_of().bias_change(part) for part in parts))


def test_trap_19_the_bias_is_fp32_when_the_model_computes_in_bf16() -> None:
    """Steps of 0.001 vanish in bf16 beside a bias of 0.5."""
    ffn = ffn_of("sigmoid", EXPERTS, 2, {"loss_free": {}})
    router = router_of(ffn, training=True, dtype=torch.float32)
    assert build_router(ffn, 6, init_std=1.0).bias_E.dtype == router.bias_E.dtype == torch.float32
    router.bias_E += 0.5
    router.bias_E += 0.001
    routing = router(random(10, 6).bfloat16(), context_of(1, 10))
    assert router.bias_E.unique().item() == pytest.approx(0.501, abs=1e-7)
    assert routing.ranking_TE.dtype == torch.float32


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_trap_18_forward_leaves_the_bias_alone(training: bool) -> None:
    """In evaluation, and in training too: only the step moves it."""
    ffn = ffn_of("sigmoid", EXPERTS, 2, {"loss_free": {}})
    layer = make_layer(ffn=ffn).train(training)
    before_E = random(EXPERTS)
    layer.router.bias_E.copy_(before_E)
    for seed in range(3):
        layer(tokens(2, 5, seed)).y_BSD.sum().backward()
    assert torch.equal(layer.router.bias_E, before_E)
