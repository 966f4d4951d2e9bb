"""A learned bias on the logits, as gpt-oss has it: it changes the choice and the weights, and it learns."""

import pytest
import torch
from routing_cases import DIM, EXPERTS, context_of, ffn_of, random, router_of
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from moe_train.moe.roles import Kind, roles_of
from moe_train.moe.routers import build_router

TOKENS, TOP_K = 40, 3
BIASED = ffn_of("topk_softmax", EXPERTS, TOP_K, bias=True)


def test_it_is_the_router_of_transformers() -> None:
    router, x_TD = router_of(BIASED), random(TOKENS, DIM)
    published = GptOssTopKRouter(
        GptOssConfig(num_experts_per_tok=TOP_K, num_local_experts=EXPERTS, hidden_size=DIM)
    ).double()
    published.weight, published.bias = nn.Parameter(router.weight.detach()), nn.Parameter(router.logit_bias_E.detach())
    logits_TE, weights_TK, experts_TK = published(x_TD)
    routing = router(x_TD, context_of(1, TOKENS))
    assert torch.equal(routing.experts_TK, experts_TK)
    assert torch.allclose(routing.logits_TE, logits_TE, rtol=0, atol=1e-14)
    assert torch.allclose(routing.weights_TK, weights_TK, rtol=0, atol=1e-14)


def test_it_changes_choice_and_weights() -> None:
    """Unlike the bias of loss-free balancing, which the weights do not know."""
    router, x_TD = router_of(BIASED), random(TOKENS, DIM)
    router.logit_bias_E.data.zero_()
    without = router(x_TD, context_of(1, TOKENS))
    router.logit_bias_E.data[5] = 100.0
    routing = router(x_TD, context_of(1, TOKENS))
    assert not (without.experts_TK[:, 0] == 5).all()
    assert (routing.experts_TK[:, 0] == 5).all()
    assert torch.allclose(routing.weights_TK[:, 0], torch.ones(TOKENS, dtype=torch.float64))
    assert torch.allclose(routing.logits_TE - without.logits_TE, torch.eye(EXPERTS, dtype=torch.float64)[5] * 100)


def test_it_learns_from_the_task() -> None:
    router, x_TD = router_of(BIASED, training=True), random(TOKENS, DIM)
    router(x_TD, context_of(1, TOKENS)).weights_TK[:, 0].sum().backward()
    assert router.logit_bias_E.grad is not None
    assert router.logit_bias_E.grad.any()


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_there_when_it_is_asked_for(bias: bool) -> None:
    router = build_router(ffn_of("topk_softmax", EXPERTS, TOP_K, bias=bias), DIM, init_std=0.5)
    roles = roles_of(router)
    assert set(roles) == ({"weight", "logit_bias_E"} if bias else {"weight"})
    if bias:
        assert (roles["logit_bias_E"].kind, roles["logit_bias_E"].std) == (Kind.ROUTER, 0.0)
        assert router.logit_bias_E.shape == (EXPERTS,)


def test_bf16_tokens_meet_it_in_fp32() -> None:
    router = router_of(BIASED, dtype=torch.float32)
    routing = router(random(TOKENS, DIM).bfloat16(), context_of(1, TOKENS))
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
