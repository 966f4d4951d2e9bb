"""The layout contract with sharded weights: the same figures, gradients, norms, weights and biases as the oracle's."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.distributed as dist
from layout_cases import CASES
from layouts import RATES, Case, differences, run_layout
from spawn import run_ranks

from moe_train.dist.mesh import build_mesh

pytestmark = pytest.mark.timeout(900)
NAMES = {case.name: case for case in CASES}
FEW = [NAMES["top-2, global balance"], NAMES["graph of networks as by default"],
       Case("one module ahead, shared expert, untied head, loss-free",
            ("model.layers=1", "model.mtp.depth=1", "model.ffn.num_shared_experts=1", "model.tie_embeddings=false",
             "router.kind=sigmoid", "balance.loss_free.rate=0.05"), padding="uneven")]  # fmt: skip
FEW_LAYOUTS = {4: [(2, 2, 1), (1, 4, 4)], 2: [(1, 2, 1)]}
"""(ep, dp_shard, accumulation) by world size: experts sharded and not, replicas and none."""
MORE = [NAMES[name] for name in (
    "MoE every other layer, shared expert, untied head",
    "all tokens to one expert for good, ranks without valid tokens",
    "ranks with zero valid tokens",
    "capacity per sequence",
    "topk, loss-free with a bias that decides",
    "padded buffers, probability, reroute, renormalised after",
    "gpt-oss: sinks, windows, biases everywhere, clamped activation, one module ahead",
    "DeepSeek-V3: latent attention, groups with bias, losses per sequence, first dense, shared, two modules ahead",
    "two modules ahead, dense",
    "graph of blocks as the original: LayerNorm, biases, learned positions, own head",
    "graph of networks in chunks, recomputed, orthogonal, two of three sources, softmax, attention pooling",
    "graph of blocks by chunks, recomputed, orthogonal, self edges, degree, one module ahead",
)]  # fmt: skip
MORE_LAYOUTS = {4: [(1, 2, 1), (1, 4, 4), (2, 2, 4), (2, 4, 1), (4, 2, 4), (4, 4, 1)], 2: [(1, 2, 4), (2, 2, 1)]}


def share_of_truths(world, jobs):
    """The truths by case and split, each rank having asked the oracle for its share of them."""
    own = {
        (case.name, split): oracle.train(case.config(), case.whole_model(), case.batches(), RATES, split)
        for case, split in jobs[world.rank :: world.size]
    }
    parts = [None] * world.size
    dist.all_gather_object(parts, own)
    return {key: truth for part in parts for key, truth in part.items()}


def wrong_on(world, cases, layouts):
    """What differs from the truth on this rank, by case and layout; what differs in fp32."""
    torch.set_num_threads(1)
    jobs = {(c, c.split(world.size, accumulation)) for c in cases for _, _, accumulation in layouts}
    truths = share_of_truths(world, sorted(jobs, key=lambda job: (job[0].name, job[1].passes, job[1].ranks)))
    wrong = {}
    for ep, dp_shard, accumulation in layouts:
        mesh = build_mesh(world, ep, dp_shard)
        for case in cases:
            found = run_layout(mesh, case, accumulation)
            truth = truths[case.name, case.split(world.size, accumulation)]
            wrong[case.name, ep, dp_shard, accumulation] = differences(found, truth, 1e-10)
    first = truths[cases[0].name, cases[0].split(world.size, layouts[0][2])]
    mesh = build_mesh(world, *layouts[0][:2])
    return wrong, differences(run_layout(mesh, cases[0], layouts[0][2], torch.float32), first, 1e-5)


def expected(cases, layouts):
    return {(case.name, *layout): [] for case in cases for layout in layouts}


@pytest.mark.parametrize("size", [2, 4])
def test_a_few_cases_equal_the_oracle_also_in_fp32(size):
    """In fp32 torch would ask for a scaled sum, which gloo has not."""
    layouts = FEW_LAYOUTS[size]
    for wrong, in_fp32 in run_ranks(wrong_on, size, FEW, layouts):
        assert wrong == expected(FEW, layouts)
        assert in_fp32 == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_of_model_equals_the_oracle(size):
    layouts = MORE_LAYOUTS[size]
    for wrong, in_fp32 in run_ranks(wrong_on, size, MORE, layouts, timeout_s=600, collective_timeout_s=600):
        assert wrong == expected(MORE, layouts)
        assert in_fp32 == []
