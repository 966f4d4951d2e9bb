"""The router: weights, precision, gradient. Its published numbers are in tests/golden."""

import pytest
import torch
from moe_samples import DIM, routing_of

from moe_train.config.schema import TopKRouterConfig
from moe_train.moe.router import TopKRouter


def logits(tokens: int = 12, experts: int = 5) -> torch.Tensor:
    return torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_normalised_weights_are_a_softmax_over_the_selected(top_k: int) -> None:
    routing = routing_of(logits(), top_k, "selected")
    expected_TK = logits().gather(1, routing.experts_TK).softmax(dim=1)
    assert torch.allclose(routing.weights_TK, expected_TK, rtol=0, atol=1e-14)


def test_plain_weights_are_the_probabilities_best_first() -> None:
    routing = routing_of(logits(), 3, "none")
    expected_TK = logits().softmax(dim=1).sort(dim=1, descending=True).values[:, :3]
    assert torch.allclose(routing.weights_TK, expected_TK, rtol=0, atol=1e-14)


def test_all_experts_chosen_is_the_whole_softmax() -> None:
    routing = routing_of(logits(), 5, "none")
    assert torch.allclose(routing.weights_TK.sum(dim=1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-14)


def test_equal_scores_go_to_the_lowest_experts() -> None:
    assert routing_of(torch.zeros(3, 5), 2).experts_TK.tolist() == [[0, 1]] * 3


def test_bf16_tokens_are_routed_in_fp32() -> None:
    """Switch, table 2: a bf16 router diverged. Two logits that bf16 cannot tell apart must stay apart."""
    router = TopKRouter(DIM, 2, 1, TopKRouterConfig(normalize="none"), init_std=1.0)
    torch.nn.init.ones_(router.weight)
    router.weight.data[1] += 2.0**-12
    routing = router(torch.ones(3, DIM, dtype=torch.bfloat16))
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert routing.experts_TK.flatten().tolist() == [1, 1, 1]


def test_fp64_tokens_are_routed_in_fp64() -> None:
    assert routing_of(logits(), 2).logits_TE.dtype == torch.float64


def test_top_1_normalised_weights_carry_no_gradient() -> None:
    """Why the configuration refuses this pair: the router would never learn from the task."""
    z_TE = logits().requires_grad_()
    (gradient_TE,) = torch.autograd.grad(routing_of(z_TE, 1, "selected").weights_TK.sum(), z_TE)
    assert gradient_TE.abs().max() < 1e-15
    (gradient_TE,) = torch.autograd.grad(routing_of(z_TE, 1, "none").weights_TK.sum(), z_TE)
    assert gradient_TE.abs().max() > 1e-2
