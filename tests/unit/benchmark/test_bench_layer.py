"""The layer that is timed: equal work, stated skew, right numbers, and peers that compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.benchmark import layer_ours
from moe_train.benchmark.layer_case import LayerCase, draw
from moe_train.benchmark.layer_truth import agreement, best_experts, fullest_over_mean, relative_error, truth_of
from moe_train.benchmark.model_case import ModelCase, draw_tokens
from moe_train.benchmark.peers import deepspeed_layer, torchtitan_layer, transformers_layer, transformers_model
from moe_train.benchmark.peers.registry import LAYERS, Entry
from moe_train.config.bench import SHAPES, BenchConfig, LayerBench, ModelBench
from moe_train.models.counts import count
from moe_train.models.sizes import moe_size, network_size

TINY = LayerCase(experts=8, top_k=2, expert_dim=32, tokens=128, dim=64, routing="zipf", precision="fp32", seed=0)
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative errors that the number format explains: fp32 has 2^-24, bf16 2^-9, of which several add up."""


def case_of(shape: int, routing: str) -> LayerCase:
    return LayerCase.of(BenchConfig(), LayerBench(), SHAPES[shape], routing)


def layer_under_test(case: LayerCase, **more: object) -> dict[str, object]:
    return layer_ours.build({"case": case.arguments(), "compute": ["auto"], "compile": "none", "checks": True, **more})


@settings(deadline=None, max_examples=20)
@given(experts=st.integers(1, 64), top_k=st.integers(1, 8), expert_dim=st.integers(1, 64))
def test_the_dense_twin_does_the_work_of_the_experts(experts: int, top_k: int, expert_dim: int) -> None:
    case = replace(TINY, experts=experts, top_k=min(top_k, experts), expert_dim=expert_dim)
    routed = moe_size(case.dim, case.ffn("auto")).multiplied - case.experts * case.dim  # less the router
    assert case.dense.gflop == pytest.approx(case.gflop)
    assert case.gflop == pytest.approx(6 * case.tokens * routed / 1e9)
    assert network_size(case.dim, case.dense.expert_dim, "swiglu").multiplied == routed


@pytest.mark.parametrize("shape", range(2))
def test_the_dense_model_does_the_work_of_the_sparse_one(shape: int) -> None:
    bench = ModelBench()
    case = ModelCase.of(BenchConfig(), bench, SHAPES[shape])
    sparse, dense = (count(case.model(is_dense), case.vocab_size, case.seq_len) for is_dense in (False, True))
    routers = bench.layers * SHAPES[shape].experts * bench.dim
    assert sparse.forward_flops_per_token - dense.forward_flops_per_token == 2 * routers
    assert case.gflop(is_dense=True) == pytest.approx(3e-9 * dense.forward_flops_per_token * case.tokens)


@pytest.mark.parametrize(("shape", "fullest"), [(0, 3.0), (1, 10.0), (2, 15.5)])
def test_zipf_is_skewed_as_stated_and_balanced_is_not(shape: int, fullest: float) -> None:
    for routing, low, high in (("zipf", 0.9 * fullest, 1.1 * fullest), ("balanced", 1.0, 1.4)):
        case = replace(case_of(shape, routing), expert_dim=1)
        chosen_TK = best_experts(draw(case), case.top_k)
        assert low <= fullest_over_mean(chosen_TK, case.experts) <= high


def test_values_are_bf16_numbers_and_the_same_in_every_process() -> None:
    data, again = draw(TINY), draw(TINY)
    for name, value in vars(data).items():
        assert torch.equal(value, value.to(torch.bfloat16).to(value.dtype)), name
        assert torch.equal(value, getattr(again, name)), name
    assert bool((data.x_BSD[..., -1] == 1.0).all())
    assert not torch.equal(draw(replace(TINY, seed=1)).x_BSD, data.x_BSD)


def test_the_constant_feature_carries_the_bias_to_any_router() -> None:
    zipf, balanced = draw(TINY), draw(replace(TINY, routing="balanced"))
    shift_E = (zipf.x_BSD[0] @ (zipf.router_ED - balanced.router_ED).T)[0]
    expected_E = -torch.arange(1, 9, dtype=torch.float32).log()
    assert torch.allclose(shift_E, expected_E, atol=2**-7)


def test_the_truth_is_that_of_tokens_one_by_one() -> None:
    case = replace(TINY, experts=4, expert_dim=3, tokens=5, dim=6)
    data = draw(case)
    chosen_TK = best_experts(data, case.top_k)
    x_TD = data.x_BSD[0].double().requires_grad_()
    rows = []
    for x_D, chosen_K in zip(x_TD, chosen_TK.tolist(), strict=True):
        logits = [(x_D * data.router_ED[e].double()).sum() for e in chosen_K]
        total = sum(torch.exp(logit) for logit in logits)
        row = torch.zeros(6, dtype=torch.float64)
        for e, logit in zip(chosen_K, logits, strict=True):
            inner = data.gate_up_EDF2[e].double().T @ x_D
            gate, up = inner[:3], inner[3:]
            row = row + torch.exp(logit) / total * (data.down_EFD[e].double().T @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(row)
    y_TD = torch.stack(rows)
    torch.autograd.backward(y_TD, data.gradient_BSD[0].double())
    exact = truth_of(data, chosen_TK.flip(1))
    assert relative_error(exact.y_TD, y_TD.detach()) < 1e-12
    assert relative_error(exact.dx_TD, x_TD.grad) < 1e-12


def test_figures_of_a_choice() -> None:
    chosen_TK, best_TK = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 0]])
    assert agreement(chosen_TK, best_TK) == 0.75
    assert fullest_over_mean(torch.tensor([[0, 1], [0, 2]]), 4) == 2.0
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_layer_and_its_twin_compute_what_they_should(precision: str) -> None:
    made = layer_under_test(replace(TINY, precision=precision))
    names = [name for name, value in made.items() if not isinstance(value, float)]
    halves = ["", layer_ours.BF16_WEIGHTS] if precision == "bf16" else [""]
    expected = [f"{kind}{half}" for kind in ("dense", "ours auto") for half in halves]
    assert names == [*expected, f"ours auto{layer_ours.ROUTED_AHEAD}"]
    for name in expected:
        assert made[f"{name}:error y"] < ROUNDING[precision]
        assert made[f"{name}:error dx"] < ROUNDING[precision]
    for name in names:
        assert made[name].run_ms() > 0.0


def test_wrong_numbers_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth of other weights: what a layer would look like that computes something else."""
    monkeypatch.setattr("moe_train.benchmark.layer_pass.truth_of", lambda data, chosen_TK: truth_of(
        replace(data, down_EFD=data.down_EFD.flip(0)), chosen_TK))  # fmt: skip
    made = layer_under_test(TINY)
    assert made["ours auto:error y"] > 0.5


def test_a_layer_that_cannot_be_built_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> object:
        raise RuntimeError("no such way")

    monkeypatch.setattr(layer_ours, "our_candidate", refuse)
    made = layer_under_test(TINY)
    with pytest.raises(RuntimeError, match="no such way"):
        made["ours auto"].run_ms()
    assert made["dense"].run_ms() > 0.0


PEERS = {
    "transformers_eager": (transformers_layer, {"experts": "eager"}),
    "transformers_grouped_mm": (transformers_layer, {"experts": "grouped_mm"}),
    "deepspeed": (deepspeed_layer, {}),
    "torchtitan": (torchtitan_layer, {}),
}


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_the_same_layer(name: str, top_k: int) -> None:
    if LAYERS[name].missing:
        pytest.skip(f"not installed: {', '.join(LAYERS[name].missing)}")
    module, own = PEERS[name]
    case = replace(TINY, top_k=top_k, precision="bf16")
    made = module.build({"case": case.arguments(), "checks": True, **own})
    assert made[name].run_ms() > 0.0, "nothing failed"
    assert made[f"{name}:error y"] < ROUNDING["bf16"]
    assert made[f"{name}:error dx"] < ROUNDING["bf16"]
    assert made[f"{name}:same routing"] > 0.95
    assert 1.5 < made[f"{name}:fullest/mean"] <= 8 / top_k


def test_the_table_of_peers_and_these_tests_name_the_same() -> None:
    assert set(LAYERS) == set(PEERS)


def test_a_peer_that_is_not_installed_is_told_with_what_installs_it() -> None:
    entry = Entry.of("nowhere:build", ("torch", "surely_not_there"), "fine")
    assert entry.missing == ("surely_not_there",)
    assert "surely_not_there not installed (pip install 'moe_train[bench]')" in entry.note
    assert Entry.of("torch:build", ("torch",), "fine").note == f"torch {torch.__version__}: fine"


def test_transformers_trains_a_model_of_our_size() -> None:
    case = ModelCase(4, 2, 16, 2, 32, 2, 64, 16, 2, "bf16", 0)
    made = transformers_model.build({"case": case.arguments(), "experts": "eager", "checks": True})
    assert made["transformers_eager"].run_ms() > 0.0
    assert made["transformers_eager:parameters"] == count(case.model(), 64, 16).total
    assert made["transformers_eager:first loss"] == pytest.approx(torch.tensor(64.0).log().item(), abs=0.2)


def test_the_tokens_of_a_step() -> None:
    case = ModelCase(4, 2, 16, 2, 32, 2, 64, 16, 3, "bf16", 0)
    tokens_BS, labels_BS = draw_tokens(case)
    assert tokens_BS.shape == labels_BS.shape == (3, 16)
    assert torch.equal(tokens_BS[:, 1:], labels_BS[:, :-1])
    assert int(tokens_BS.max()) < 64
