"""Optimizer groups and the learning-rate schedule."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case

from moe_train.config.schema import OptimConfig
from moe_train.training.optim import build_optimizer, learning_rate

QUICK = settings(max_examples=100, deadline=None)
CONFIG = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)


@pytest.mark.parametrize("overrides", [(), ("model=dense_tiny", "model.ffn.num_experts=0"),
                                       ("model.ffn.num_shared_experts=1", "model.tie_embeddings=false")])  # fmt: skip
def test_trap_32_every_parameter_is_in_exactly_one_group(overrides: tuple[str, ...]) -> None:
    model = Case("groups", overrides).whole_model()
    grouped = [p for group in build_optimizer(model, CONFIG).param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_vectors_are_not_decayed_and_kinds_are_apart() -> None:
    model = Case("groups").whole_model()
    names = {id(p): name for name, p in model.named_parameters()}
    for group in build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
            kind = "expert" if ".experts." in name else "router" if ".router." in name else "dense"
            assert group["name"] == kind, name


EVERYTHING = Case(
    "everything", ("model.attention.sinks=true", "model.attention.qkv_bias=true", "model.attention.out_bias=true",
                   "model.attention.qk_norm=head", "model.ffn.expert_bias=true", "model.ffn.num_shared_experts=1",
                   "model.ffn.shared_gate=true", "router.kind=topk_softmax", "router.bias=true",
                   "model.tie_embeddings=false", "model.mtp.depth=1", "model.ffn.first_dense=1"),
)  # fmt: skip
MATRICES = {
    "embedding_VD", "attention.qkv.weight", "attention.out.weight", "experts.gate_up_LDF2", "experts.down_LFD",
    "router.weight", "gate_up.weight", "down.weight", "token_gate.weight", "project.weight", "head.weight",
}  # fmt: skip
VECTORS = {
    "qkv.bias", "out.bias", "sinks_H", "norm.weight", "gate_up_bias_LF2", "down_bias_LD", "logit_bias_E",
}  # fmt: skip
"""Ends of names. Of the biases of experts there is one vector for each: stacked, they have two dimensions."""


def test_no_bias_is_decayed_not_even_that_of_stacked_experts() -> None:
    model = EVERYTHING.whole_model()
    decays = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
        for parameter in group["params"]
    }
    seen = set()
    for name, parameter in model.named_parameters():
        ends = [end for end in MATRICES | VECTORS if name.endswith(end)]
        assert ends, f"{name} is in neither list"
        seen.update(ends)
        assert decays[id(parameter)] == (0.3 if ends[0] in MATRICES else 0.0), name
    assert seen == MATRICES | VECTORS


def test_optimizer_takes_its_numbers_from_the_configuration() -> None:
    config = OptimConfig(lr=0.5, betas=(0.7, 0.8), eps=1e-6)
    for group in build_optimizer(Case("groups").whole_model(), config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1)],
    ids=["first", "half warm", "warm", "first of the cosine", "half way down", "last"],
)
def test_values_of_the_schedule(step: int, expected: float) -> None:
    assert learning_rate(step, 101, CONFIG) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 5, OptimConfig(lr=0.3, warmup_steps=0)) == pytest.approx(0.3)


@QUICK
@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.0, 1.0))
def test_it_rises_then_falls_within_bounds(steps: int, warmup_steps: int, ratio: float) -> None:
    warmup_steps = min(warmup_steps, steps)
    config = OptimConfig(lr=2.0, min_lr_ratio=ratio, warmup_steps=warmup_steps)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    warm, cool = rates[:warmup_steps], rates[warmup_steps:]
    assert all(a < b for a, b in itertools.pairwise(warm))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(cool))
    assert all(0.0 < rate <= 2.0 + 1e-12 for rate in warm)
    assert all(2.0 * ratio - 1e-12 <= rate <= 2.0 + 1e-12 for rate in cool)
    if len(cool) > 1:
        assert cool[0] == pytest.approx(2.0)
        assert cool[-1] == pytest.approx(2.0 * ratio, abs=1e-12)
