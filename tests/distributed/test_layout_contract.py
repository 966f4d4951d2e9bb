"""The layout contract: loss, balance loss, every gradient, gradient norm and weights after three steps are the same on
every layout, and equal to the plain token-by-token oracle (fp64, 1e-10)."""

import oracle
import pytest
import torch
from layouts import RATES, Case, assert_equal, run_layout
from spawn import run_ranks

CASES = [
    Case("top-2, global balance"),
    Case("top-1 with probabilities as weights", ("model=switch_tiny", "model.ffn.capacity.kind=dropless")),
    Case("top_k = num_experts, weights scaled", ("model.ffn.top_k=4", "model.ffn.router.scale=2.5")),
    Case("all tokens to the first experts", zero_router=True),
    Case("all tokens to one expert", ("model=switch_tiny", "model.ffn.capacity.kind=dropless"), zero_router=True),
    Case("uneven valid tokens per rank and micro-batch", padding="uneven"),
    Case("ranks with zero valid tokens", padding="whole ranks"),
    Case("balance within each sequence", ("model/ffn/balance=sequence",), padding="uneven"),
    Case("capacity per sequence", ("model/ffn/capacity=factor", "model.ffn.capacity.factor=0.8"), padding="uneven"),
    Case("MoE every other layer, shared expert, untied head",
         ("model.ffn.every=2", "model.ffn.num_shared_experts=1", "model.tie_embeddings=false")),
]  # fmt: skip
LAYOUTS = {1: [(1, 1), (1, 4)], 2: [(1, 1), (2, 1), (2, 4)], 4: [(1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (4, 4)]}
"""(ep, accumulation) by world size."""


def truth_of(case: Case) -> oracle.Truth:
    return oracle.train(case.config(), case.whole_model(), case.batches(), RATES)


def check_layouts(world, cases, truths):
    torch.set_num_threads(1)
    for case, truth in zip(cases, truths, strict=True):
        for ep, accumulation in LAYOUTS[world.size]:
            found = run_layout(world, case, ep, accumulation)
            what = f"{case.name}: world {world.size}, ep {ep}, accumulation {accumulation}"
            assert_equal(found, truth, 1e-10, what)


@pytest.fixture(scope="module")
def truths() -> list[oracle.Truth]:
    return [truth_of(case) for case in CASES]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_equals_the_oracle(world_size, truths):
    run_ranks(check_layouts, world_size, CASES, truths, timeout_s=240)


def check_fp32(world, case, truth):
    for ep in (1, 2, 4):
        assert_equal(run_layout(world, case, ep, 1, torch.float32), truth, 1e-5, f"fp32, ep {ep}")


def test_fp32_holds_to_1e5(truths):
    run_ranks(check_fp32, 4, CASES[0], truths[0])
