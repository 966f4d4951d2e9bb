"""What holds for every router: ties, precision, draws, padding, gradients."""

import math

import pytest
import torch
from routing_cases import DIM, EXPERTS, LEARNED, OF_ALL_TOKENS, ROUTERS, context_of, random, router_of, with_router
from torch import nn

from moe_train.config.model import FFNConfig
from moe_train.moe.routers import build_router
from moe_train.moe.routing import Routing

BATCH, LENGTH = 4, 10
TOKENS = BATCH * LENGTH
every_router = pytest.mark.parametrize("ffn", ROUTERS.values(), ids=ROUTERS)
every_learned_router = pytest.mark.parametrize("ffn", LEARNED.values(), ids=LEARNED)
in_both_modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def assert_equal(found: Routing, expected: Routing, tolerance: float = 0.0) -> None:
    assert torch.equal(found.experts_TK, expected.experts_TK)
    for name in ("logits_TE", "probabilities_TE", "ranking_TE", "weights_TK"):
        a, b = getattr(found, name), getattr(expected, name)
        assert torch.allclose(a, b, rtol=0, atol=tolerance), name
    for name in ("chosen_TK", "declined_TK"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@every_router
@in_both_modes
def test_shapes_and_ranges(ffn: FFNConfig, training: bool) -> None:
    routing = router_of(ffn, training=training)(random(TOKENS, DIM), context_of(BATCH, LENGTH))
    columns = EXPERTS if ffn.router.kind == "expert_choice" else ffn.top_k
    assert routing.experts_TK.shape == routing.weights_TK.shape == (TOKENS, columns)
    assert routing.experts_TK.dtype == torch.int64
    assert 0 <= routing.experts_TK.min() <= routing.experts_TK.max() < EXPERTS
    assert all(len(set(row)) == columns for row in routing.experts_TK.tolist()), "an expert twice"
    assert torch.allclose(routing.probabilities_TE.sum(dim=1), torch.ones(TOKENS, dtype=torch.float64), atol=1e-12)
    assert routing.weights_TK.min() >= 0.0
    assert not routing.ranking_TE.requires_grad


@pytest.mark.parametrize("name", [name for name in ROUTERS if "hierarchical" not in name])
@in_both_modes
def test_weights_of_the_own_choices_are_the_weights(name: str, training: bool) -> None:
    """What rerouting relies on: `weigh` gives the weights of any choices, so also of these."""
    ffn = ROUTERS[name]
    routing = router_of(ffn, training=training)(random(TOKENS, DIM), context_of(BATCH, LENGTH))
    assert torch.allclose(routing.weigh(routing.experts_TK), routing.weights_TK, rtol=0, atol=1e-14)


@every_learned_router
def test_equal_scores_go_to_the_lowest_experts(ffn: FFNConfig) -> None:
    """An untrained router must send the same tokens to the same experts on every device."""
    router = router_of(ffn)
    for parameter in router.parameters():
        nn.init.zeros_(parameter)
    experts_TK = router(random(TOKENS, DIM), context_of(BATCH, LENGTH)).experts_TK
    columns = EXPERTS if ffn.router.kind == "expert_choice" else ffn.top_k
    assert experts_TK.tolist() == [list(range(columns))] * TOKENS


@every_learned_router
@in_both_modes
def test_trap_28_bf16_tokens_are_routed_in_fp32(ffn: FFNConfig, training: bool) -> None:
    """Switch, table 2: a bf16 router diverged. The choice is that of an fp32 router, to the last bit."""
    router = router_of(ffn, training=training, dtype=torch.float32)
    x_TD = random(TOKENS, DIM).bfloat16()
    found = router(x_TD, context_of(BATCH, LENGTH))
    for name in ("logits_TE", "probabilities_TE", "ranking_TE", "weights_TK"):
        assert getattr(found, name).dtype == torch.float32, name
    assert_equal(found, router(x_TD.float(), context_of(BATCH, LENGTH)))


def test_scores_that_bf16_cannot_tell_apart_stay_apart() -> None:
    router = router_of(LEARNED["topk"], dtype=torch.float32)
    nn.init.ones_(router.weight)
    router.weight.data[5] += 2.0**-12
    experts_TK = router(torch.ones(3, DIM, dtype=torch.bfloat16), context_of(1, 3)).experts_TK
    assert experts_TK[:, 0].tolist() == [5, 5, 5]


@every_router
def test_fp64_tokens_are_routed_in_fp64(ffn: FFNConfig) -> None:
    routing = router_of(ffn, training=True)(random(TOKENS, DIM), context_of(BATCH, LENGTH))
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == routing.probabilities_TE.dtype == torch.float64


@every_router
@in_both_modes
def test_trap_28_recomputation_decides_the_same(ffn: FFNConfig, training: bool) -> None:
    """Forward and backward must use the same experts, whatever torch's generators did between."""
    router, x_TD, context = (
        router_of(stochastic(ffn), training=training),
        random(TOKENS, DIM),
        context_of(BATCH, LENGTH),
    )
    torch.manual_seed(0)
    first = router(x_TD, context)
    torch.manual_seed(1)
    assert_equal(router(x_TD, context), first)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in OF_ALL_TOKENS])
@in_both_modes
def test_draws_are_equal_for_whatever_ranks_hold_the_tokens(name: str, training: bool) -> None:
    router, x_TD = router_of(stochastic(ROUTERS[name]), training=training), random(TOKENS, DIM)
    whole = router(x_TD, context_of(BATCH, LENGTH, seed=5))
    cut = LENGTH
    parts = [
        router(x_TD[:cut], context_of(1, LENGTH, seed=5)),
        router(x_TD[cut:], context_of(BATCH - 1, LENGTH, seed=5, first=1)),
    ]
    assert torch.equal(torch.cat([part.experts_TK for part in parts]), whole.experts_TK)
    weights_TK = torch.cat([part.weights_TK for part in parts])
    assert torch.allclose(weights_TK, whole.weights_TK, rtol=0, atol=1e-13)
    if whole.declined_TK is not None:
        assert torch.equal(torch.cat([part.declined_TK for part in parts]), whole.declined_TK)


@every_router
def test_evaluation_draws_nothing(ffn: FFNConfig) -> None:
    router, x_TD = router_of(stochastic(ffn)), random(TOKENS, DIM)
    assert_equal(router(x_TD, context_of(BATCH, LENGTH, seed=1)), router(x_TD, context_of(BATCH, LENGTH, seed=2)))


@every_learned_router
def test_training_draws_anew_each_step(ffn: FFNConfig) -> None:
    router, x_TD = router_of(stochastic(ffn), training=True), random(TOKENS, DIM)
    one, two = (router(x_TD, context_of(BATCH, LENGTH, seed=seed)) for seed in (1, 2))
    assert not torch.equal(one.weights_TK, two.weights_TK)


@every_router
def test_forward_changes_neither_tokens_nor_state(ffn: FFNConfig) -> None:
    """Switch's jitter multiplied the experts' input too in a well-known port, where fp32 made its cast a no-op."""
    router = router_of(stochastic(ffn), training=True, dtype=torch.float32)
    x_TD = random(TOKENS, DIM).float()
    before_TD, state = x_TD.clone(), {name: value.clone() for name, value in router.state_dict().items()}
    router(x_TD, context_of(BATCH, LENGTH))
    assert torch.equal(x_TD, before_TD)
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())


@every_router
@in_both_modes
def test_trap_13_padding_has_no_part_in_what_valid_tokens_get(ffn: FFNConfig, training: bool) -> None:
    valid_BS = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [0], [7]])
    router, context = router_of(ffn, training=training), context_of(BATCH, LENGTH, valid_BS=valid_BS)
    x_TD, valid_T = random(TOKENS, DIM), valid_BS.flatten()
    other_TD = torch.where(valid_T.unsqueeze(1), x_TD, 1e3 * random(TOKENS, DIM, seed=9))
    one, two = router(x_TD, context), router(other_TD, context)
    taken = [r.experts_TK if r.chosen_TK is None else torch.where(r.chosen_TK, r.experts_TK, -1) for r in (one, two)]
    assert torch.equal(taken[0][valid_T], taken[1][valid_T])
    assert torch.allclose(one.weights_TK[valid_T], two.weights_TK[valid_T], rtol=0, atol=1e-14)


@every_learned_router
def test_no_expert_comes_twice_when_dropout_leaves_too_few(ffn: FFNConfig) -> None:
    routing = router_of(with_router(ffn, expert_dropout=0.9), training=True)(random(400, DIM), context_of(4, 100))
    assert all(len(set(row)) == len(row) for row in routing.experts_TK.tolist())


@every_learned_router
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4], ids=["zero", "usual", "huge"])
@pytest.mark.parametrize("num_valid", [0, 7], ids=["only padding", "some padding"])
def test_gradients_are_finite(ffn: FFNConfig, size: float, num_valid: int) -> None:
    router = router_of(with_router(ffn, expert_dropout=0.5), training=True)
    x_TD = (size * random(LENGTH, DIM)).requires_grad_()
    routing = router(x_TD, context_of(1, LENGTH, valid_BS=torch.arange(LENGTH).unsqueeze(0) < num_valid))
    assert not routing.ranking_TE.isnan().any()
    loss = routing.weights_TK.sum() + routing.probabilities_TE.square().sum() + routing.logits_TE.logsumexp(1).sum()
    if routing.load_TE is not None:
        loss = loss + routing.load_TE.square().sum()
    loss.backward()
    for name, value in {"x": x_TD, **dict(router.named_parameters())}.items():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name


@every_learned_router
def test_scale_multiplies_the_weights_only(ffn: FFNConfig) -> None:
    x_TD, context = random(TOKENS, DIM), context_of(BATCH, LENGTH)
    one = router_of(with_router(ffn, scale=1.0), training=True)(x_TD, context)
    three = router_of(with_router(ffn, scale=3.0), training=True)(x_TD, context)
    assert torch.equal(one.experts_TK, three.experts_TK)
    assert torch.allclose(three.weights_TK, 3.0 * one.weights_TK, rtol=1e-14, atol=0)
    assert torch.equal(one.probabilities_TE, three.probabilities_TE)


def test_jitter_multiplies_each_input_of_the_router_within_its_bounds() -> None:
    """x' = x · U[1 - j, 1 + j] (Switch, 2.4), found from the logits: the matrix is the identity."""
    ffn = with_router(ROUTERS["topk"], jitter=0.1)
    router = build_router(ffn, EXPERTS, init_std=1.0).double().train()
    router.weight = nn.Parameter(torch.eye(EXPERTS, dtype=torch.float64))
    ones_TD = torch.ones(4000, EXPERTS, dtype=torch.float64)
    factors_TD = router(ones_TD, context_of(40, 100)).logits_TE
    assert 0.9 < factors_TD.min() < 0.901
    assert 1.099 < factors_TD.max() < 1.1
    assert factors_TD.mean().item() == pytest.approx(1.0, abs=3 * 0.1 / math.sqrt(3 * factors_TD.numel()))
    assert torch.equal(router.eval()(ones_TD, context_of(40, 100)).logits_TE, ones_TD)


def stochastic(ffn: FFNConfig) -> FFNConfig:
    """The same with everything drawn that can be."""
    return with_router(ffn, jitter=0.1, expert_dropout=0.2) if ffn.router.kind != "hash" else ffn
