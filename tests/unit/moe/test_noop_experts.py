"""Experts that do nothing: what a token sends there is not computed, adds nothing, and is no drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_samples import DIM, HIDDEN, context_of, plain_loop, tokens
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.config.routing import RouterConfig
from moe_train.models.initialise import initialise
from moe_train.models.sizes import moe_size
from moe_train.moe.balance import Balance, NoopRecord
from moe_train.moe.capacity import Capacity
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.moe.routers import build_router

EXPERTS, NOOPS = 4, 2
ROUTERS = {
    "topk": {"kind": "topk"},
    "topk, unnormalised": {"kind": "topk", "normalize": "none"},
    "topk_softmax": {"kind": "topk_softmax", "bias": True},
    "sigmoid": {"kind": "sigmoid"},
    "noisy_topk": {"kind": "noisy_topk"},
}


def layer_of(router: dict[str, Any], noops: int = NOOPS, top_k: int = 2, **sections: Any) -> MoELayer:
    """A layer in fp64 with values of a size that tells its tokens apart."""
    ffn = FFNConfig.model_validate(
        {"num_experts": EXPERTS, "num_noop_experts": noops, "top_k": top_k, "expert_dim": HIDDEN, "router": router}
        | sections
    )
    exchange = LocalExchange(EXPERTS)
    layer = MoELayer(
        build_router(ffn, DIM, init_std=1.0),
        Capacity(ffn.capacity, EXPERTS, top_k, noops),
        exchange,
        Experts(DIM, HIDDEN, exchange.experts, init_std=0.5, out_std=0.5),
        Balance(ffn),
        None,
    ).double()
    initialise(layer, seed=1)
    with torch.no_grad():
        for place, parameter in enumerate(layer.router.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)))
    return layer


def with_idle_experts(layer: MoELayer) -> MoELayer:
    """The same as a layer of E + Z real experts, of which the last Z return zeros: what the other one must equal."""
    twin = layer_of({"kind": "topk"}, noops=0)
    total = EXPERTS + NOOPS
    twin.router = layer.router
    twin.capacity = Capacity(layer.capacity.config, total, layer.capacity.top_k)
    twin.exchange = LocalExchange(total)
    twin.experts = Experts(DIM, HIDDEN, range(total), init_std=0.5, out_std=0.5).double()
    with torch.no_grad():
        for name, parameter in twin.experts.named_parameters():
            parameter.zero_()[:EXPERTS] = layer.experts.get_parameter(name)
    twin.balance = Balance(layer.balance.ffn.model_copy(update={"num_experts": total, "num_noop_experts": 0}))
    twin.placement = type(twin.placement)(total)
    return twin


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_equals_one_with_real_experts_that_return_zeros(name: str, training: bool) -> None:
    layer = layer_of(ROUTERS[name]).train(training)
    twin = with_idle_experts(layer).train(training)
    found, truth = [], []
    for each, results in ((layer, found), (twin, truth)):
        x_BSD = tokens(3, 7)
        output = each(x_BSD, context_of(3, 7))
        losses = [value for values in output.record.statistics for value in values.unbind()]
        output.y_BSD.square().sum().backward()
        results += [output.y_BSD, x_BSD.grad, *losses]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, truth, strict=True))


def test_a_token_that_chooses_no_expert_gets_nothing_and_no_row_is_computed() -> None:
    layer = layer_of({"kind": "topk"})
    seen = []
    layer.experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        layer.router.weight.zero_()[EXPERTS:] = 1.0  # the two of them, where the sum of a token is positive
    x_BSD = tokens(1, 9).detach()
    output = layer(x_BSD, context_of(1, 9))
    idle_S = x_BSD[0].sum(dim=1) > 0
    assert idle_S.any() and not idle_S.all()
    assert (output.y_BSD[0, idle_S] == 0).all() and (output.y_BSD[0, ~idle_S] != 0).any(dim=1).all()
    (arrived,) = seen
    assert int((arrived.experts_RK < EXPERTS).sum()) == 2 * int((~idle_S).sum())
    figures = output.record.figures()
    assert figures["noop_share"] == pytest.approx(idle_S.double().mean().item())
    assert figures["dropped_fraction"] == 0.0 and len(figures["load"]) == EXPERTS + NOOPS
    assert sum(figures["load"][EXPERTS:]) == pytest.approx(figures["noop_share"])


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_no_op_experts_nothing_changes() -> None:
    layer, x_BSD = layer_of({"kind": "topk"}, noops=0), tokens(2, 5)
    assert_same(layer(x_BSD).y_BSD[0], plain_loop(layer, x_BSD[0]))
    assert not isinstance(layer(x_BSD).record, NoopRecord)


CAPACITIES = st.fixed_dictionaries(
    {
        "kind": st.just("factor"),
        "factor": st.sampled_from([0.4, 0.7, 1.0]),
        "policy": st.sampled_from(["position", "probability", "random"]),
        "order": st.sampled_from(["token", "choice"]),
        "reroute": st.booleans(),
        "pad": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(CAPACITIES, st.integers(0, 10**6))
def test_capacity_neither_limits_nor_fills_what_does_nothing(capacity: dict[str, Any], seed: int) -> None:
    layer = layer_of({"kind": "topk"}, capacity=capacity)
    x_TD, context = tokens(2, 8, seed).detach().flatten(0, 1), context_of(2, 8)
    routing = layer.router(x_TD, context)
    plan = layer.capacity.plan(routing, context, training=True)
    assert plan.experts_TK.max() < EXPERTS
    idle_TK = routing.experts_TK >= EXPERTS
    assert not plan.kept_TK[idle_TK].any(), "no choice that is none becomes one by rerouting"
    limit = -(-capacity["factor"] * 8 * 2 // (EXPERTS + NOOPS))
    per_sequence = [plan.experts_TK[plan.kept_TK & (torch.arange(16) // 8 == b).unsqueeze(1)] for b in range(2)]
    assert all(experts.bincount(minlength=EXPERTS).max() <= max(1, limit) for experts in per_sequence)
    record = layer(x_TD.view(2, 8, DIM), context).record
    figures = record.figures()
    kept = int(plan.kept_TK.sum())
    assert figures["dropped_fraction"] == pytest.approx((32 - int(idle_TK.sum()) - kept) / 32)


def test_a_bias_moves_for_experts_that_do_nothing_as_for_others() -> None:
    layer = layer_of({"kind": "sigmoid"}, balance={"loss_free": {"rate": 0.25}})
    assert layer.router.bias_E.shape == (EXPERTS + NOOPS,)
    record = layer(tokens(3, 7), context_of(3, 7)).record
    mean = 3 * 7 * 2 / (EXPERTS + NOOPS)
    expected = 0.25 * (mean - record.choices_E.double()).sign()
    assert_same(layer.balance.bias_change(record.choices_E), expected)
    assert len(record.counts_E) == EXPERTS, "who moves experts between ranks sees those that there are"


@pytest.mark.parametrize("noops", [0, 4, 12])
def test_the_expected_work_is_that_of_an_even_load(noops: int) -> None:
    router: RouterConfig = FFNConfig().router
    ffn = FFNConfig(num_experts=4, num_noop_experts=noops, top_k=2, expert_dim=8, router=router)
    expert, scores = 3 * 8 * 16, (4 + noops) * 16
    size = moe_size(16, ffn)
    assert size.stored == 4 * expert + scores
    assert size.multiplied == size.used == 2 * 4 * expert // (4 + noops) + scores
