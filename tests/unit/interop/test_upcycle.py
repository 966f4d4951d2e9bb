"""Upcycling: the first forward pass of the MoE model is the dense one's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.balance import BalanceConfig, LossFreeConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import (
    GroupLimitedRouterConfig,
    GShardRouterConfig,
    HashRouterConfig,
    HierarchicalRouterConfig,
    NoisyTopKRouterConfig,
    RouterConfig,
    SigmoidRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TopKSoftmaxRouterConfig,
)
from moe_train.interop.parts import Part, Parts
from moe_train.interop.upcycle import (
    add_noise,
    dense_twin,
    segments_of,
    tie_router_rows,
    upcycle_refusals,
    upcycled_parts,
)
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.roles import Kind, Role, roles_of

VOCAB, F = 23, 24
CPU = torch.device("cpu")


def moe(router: RouterConfig, **ffn: object) -> ModelConfig:
    stated = {"num_experts": 8, "top_k": 4, "expert_dim": F, "hidden_dim": F} | ffn
    return ModelConfig(dim=16, layers=3, heads=2, init_std=0.3, ffn=FFNConfig(router=router, **stated))  # type: ignore[arg-type]


def built(config: ModelConfig, seed: int) -> Transformer:
    model = build_model(config, VOCAB, LocalExchange(config.ffn.num_experts), "fp64", CPU)
    initialise(model, seed)
    return model


def whole_table(dense: Transformer) -> Parts:
    """One public tensor for each of ours."""
    return {name: [Part(name, tuple(p.shape))] for name, p in dense.named_parameters()}


def halved_table(dense: Transformer) -> Parts:
    """Gate and up as public tensors of their own, as Llama has them."""
    table = dict(whole_table(dense))
    for name, parameter in dense.named_parameters():
        if name.endswith("ffn.gate_up.weight") and len(parameter) == 2 * F:
            shape = (F, parameter.shape[1])
            table[name] = [Part(f"{name}.{half}", shape, ours=(slice(half * F, half * F + F),)) for half in (0, 1)]
    return table


def public_tensors(dense: Transformer, table: Parts) -> dict[str, Tensor]:
    state = dense.state_dict()
    return {part.name: state[name][part.ours].clone() for name, parts in table.items() for part in parts}


@torch.no_grad()
def upcycled(config: ModelConfig, dense: Transformer, table: Parts, noise: float = 0.0) -> Transformer:
    model = built(config, seed=1)
    state, public = model.state_dict(), public_tensors(dense, table)
    segments = segments_of(config, F)
    for name, parts in upcycled_parts(config, table, segments).items():
        for part in parts:
            piece = public[part.name][part.theirs]
            state[name][part.ours].copy_(part.factor * (piece.t() if part.transposed else piece))
    for layer in model.moe_layers.values():
        if hasattr(layer.router, "weight"):
            tie_router_rows(layer.router.weight, segments.number)
    roles = roles_of(model)
    experts = {n: (p, roles[n]) for n, p in model.named_parameters() if roles[n].kind is Kind.EXPERT}
    add_noise(experts, segments, noise, seed=3)
    return model.eval()


def relative_difference(config: ModelConfig, noise: float = 0.0, table=halved_table) -> float:
    assert upcycle_refusals(config, F) == []
    dense = built(dense_twin(config, F), seed=0).eval()
    model = upcycled(config, dense, table(dense), noise)
    tokens_BS = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = dense(tokens_BS).logits_BSV
    return float(((model(tokens_BS).logits_BSV - expected).abs().max() / expected.abs().max()).detach())


CASES = {
    "copies, top-k": moe(TopKRouterConfig()),
    "copies, scaled weights": moe(TopKRouterConfig(scale=2.0)),
    "copies, softmax of the chosen": moe(TopKSoftmaxRouterConfig(bias=True)),
    "copies, sigmoid": moe(SigmoidRouterConfig(scale=2.5)),
    "copies, noisy": moe(NoisyTopKRouterConfig()),
    "copies, hash": moe(HashRouterConfig()),
    "copies, expert biases": moe(TopKRouterConfig(), expert_bias=True),
    "copies in every other layer": moe(TopKRouterConfig(), every=2),
    "copies after a dense layer": moe(TopKRouterConfig(), first_dense=1),
    "two segments": moe(TopKRouterConfig(), expert_dim=F // 2),
    "four segments, scaled weights": moe(TopKRouterConfig(scale=4.0), expert_dim=F // 4),
    "two segments, sigmoid": moe(SigmoidRouterConfig(), expert_dim=F // 2),
    "two segments, groups and bias": moe(
        GroupLimitedRouterConfig(groups=2, top_groups=1),
        expert_dim=F // 2,
        balance=BalanceConfig(loss_free=LossFreeConfig()),
    ),
    "two segments and a shared expert": moe(TopKRouterConfig(), expert_dim=F // 3, num_shared_experts=1),
    "two segments, ungated": moe(TopKRouterConfig(), expert_dim=F // 2, activation="relu"),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_first_forward_pass_is_the_dense_one(config: ModelConfig) -> None:
    assert relative_difference(config) < 1e-12
    assert relative_difference(config, table=whole_table) < 1e-12


def test_gshard_weights_add_up_to_one_but_for_its_1e_9() -> None:
    assert relative_difference(moe(GShardRouterConfig(), top_k=2)) < 1e-7


def test_experts_of_different_segments_differ_and_copies_are_equal() -> None:
    config = CASES["two segments"]
    dense = built(dense_twin(config, F), seed=0)
    experts = upcycled(config, dense, halved_table(dense)).state_dict()["blocks.0.ffn.experts.gate_up_LDF2"]
    assert torch.equal(experts[0], experts[2])
    assert torch.equal(experts[1], experts[7])
    assert not torch.equal(experts[0], experts[1])


def test_noise_spares_the_first_copy_and_is_as_large_as_asked() -> None:
    config = CASES["two segments"]
    dense = built(dense_twin(config, F), seed=0)
    still, noisy = (upcycled(config, dense, halved_table(dense), noise) for noise in (0.0, 0.25))
    for name, expected in still.state_dict().items():
        change = noisy.state_dict()[name] - expected
        if "experts" not in name:
            assert not change.any(), name
        else:
            assert not change[:2].any()
            ratio = change[2:].std() / expected[2:].std()
            assert 0.2 < ratio < 0.3
            assert not torch.equal(change[2], change[3])
    assert relative_difference(config, noise=0.25) > 1e-3


def test_noise_does_not_depend_on_the_layout() -> None:
    config = CASES["copies, top-k"]
    segments = segments_of(config, F)
    whole = torch.rand(8, 3, 4, dtype=torch.float64)
    halves = whole[:4].clone(), whole[4:].clone()
    add_noise({"w": (whole, Role(Kind.EXPERT, 0.1, range(8)))}, segments, 0.5, seed=1)
    for half, held in zip(halves, (range(4), range(4, 8)), strict=True):
        add_noise({"w": (half, Role(Kind.EXPERT, 0.1, held))}, segments, 0.5, seed=1)
    assert torch.equal(torch.cat(halves), whole)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1.0, 2.5]))
def test_any_segmentation_without_refusal_is_exact(number: int, copies: int, chosen: int, scale: float) -> None:
    chosen = min(chosen, copies)
    ffn = {"num_experts": number * copies, "top_k": number * chosen, "expert_dim": F // number}
    assert relative_difference(moe(TopKRouterConfig(scale=scale), **ffn)) < 1e-12


REFUSED = {
    "switch do not add up": moe(SwitchRouterConfig(), top_k=1),
    "add up to a constant: set model.ffn.router.normalize": moe(TopKRouterConfig(normalize="none")),
    "hierarchical do not add up": moe(HierarchicalRouterConfig(groups=2, top_groups=1)),
    "shared experts weakens": moe(TopKRouterConfig(), expert_dim=F // 2, num_shared_experts=1, shared_gate=True),
    "a multiple of model.ffn.expert_dim=5": moe(TopKRouterConfig(), expert_dim=5),
    "expert_dim=25": moe(TopKRouterConfig(), expert_dim=F + 1),
    "top_k=3 is no multiple of the 2 segments": moe(TopKRouterConfig(), expert_dim=F // 2, top_k=3),
    "num_experts=9 is no multiple": moe(TopKRouterConfig(), expert_dim=F // 2, num_experts=9),
    "does not choose the 2 segments of a copy together": moe(HashRouterConfig(), expert_dim=F // 2),
    "activation relu is not that of the dense": moe(TopKRouterConfig(), expert_activation="relu"),
    "hidden_dim=99 of the layers that stay dense": moe(TopKRouterConfig(), first_dense=1, hidden_dim=99),
}


@pytest.mark.parametrize(("reason", "config"), REFUSED.items(), ids=REFUSED)
def test_what_could_not_be_equal_is_refused(reason: str, config: ModelConfig) -> None:
    assert any(reason in refusal for refusal in upcycle_refusals(config, F)), upcycle_refusals(config, F)
