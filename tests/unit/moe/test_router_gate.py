"""A router of two linear maps against torch's own modules, and its place among the parameters."""

import torch
from routing_cases import DIM, EXPERTS, context_of, ffn_of, random, router_of
from torch import nn

from moe_train.models.sizes import router_size
from moe_train.moe.roles import Kind, roles_of
from moe_train.moe.routers import build_router

TOKENS, TOP_K, HIDDEN = 30, 2, 5
GATE = ffn_of("topk_softmax", EXPERTS, TOP_K, gate_dim=HIDDEN)


def test_it_is_the_gate_of_the_source() -> None:
    """Linear, ReLU, Linear; the best K; a softmax over these."""
    router, x_TD = router_of(GATE), random(TOKENS, DIM)
    gate = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EXPERTS)).double()
    ours = (router.hidden_ND, router.hidden_bias_N, router.weight, router.logit_bias_E)
    for parameter, values in zip(gate.parameters(), ours, strict=True):
        parameter.data = values.data
    best = gate(x_TD).topk(TOP_K, dim=1)
    routing = router(x_TD, context_of(1, TOKENS))
    assert torch.equal(routing.experts_TK, best.indices)
    torch.testing.assert_close(routing.weights_TK, best.values.softmax(dim=1), rtol=0, atol=1e-14)
    torch.testing.assert_close(routing.logits_TE, gate(x_TD), rtol=0, atol=1e-14)


def test_its_hidden_layer_decides() -> None:
    """Else the first map might as well not be there."""
    router, x_TD = router_of(GATE), random(TOKENS, DIM)
    before = router(x_TD, context_of(1, TOKENS))
    router.hidden_ND.data = -router.hidden_ND.data
    assert not torch.equal(router(x_TD, context_of(1, TOKENS)).experts_TK, before.experts_TK)


def test_all_its_parameters_are_a_routers_and_counted() -> None:
    router = build_router(GATE, DIM, init_std=0.5)
    roles = roles_of(router)
    assert {name: role.std for name, role in roles.items()} == {
        "weight": 0.5, "logit_bias_E": 0.0, "hidden_ND": 0.5, "hidden_bias_N": 0.0
    }  # fmt: skip
    assert {role.kind for role in roles.values()} == {Kind.ROUTER}
    assert router_size(DIM, GATE).stored == sum(p.numel() for p in router.parameters())


def test_bf16_tokens_meet_it_in_fp32() -> None:
    router, x_TD = build_router(GATE, DIM, init_std=0.5).float(), random(TOKENS, DIM).bfloat16()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    assert router(x_TD, context_of(1, TOKENS)).logits_TE.dtype == torch.float32
