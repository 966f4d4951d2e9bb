"""Mixture-of-Depths on every layout, sharded weights included: the oracle's values, with experts inside and without."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.distributed as dist
from layout_cases import NOOP, SWITCHHEAD
from layouts import RATES, Case, differences, rank_batches, run_layout, torch_engine
from remat_runs import MODES, remat, run
from remat_runs import differences as bit_differences
from spawn import run_ranks

from moe_train.dist.mesh import build_mesh
from moe_train.models.depth import DepthRecord
from moe_train.moe.foresight import looking_ahead
from moe_train.training.evaluate import to_inputs

pytestmark = pytest.mark.timeout(900)
DEEP = ("model.depth.kind=mixture_of_depths", "model.depth.capacity=0.5", "model.depth.causal_coef=0.3",
        "model.depth.predictor_dim=5")  # fmt: skip
CLASSIFIER = (*DEEP[:3], "model.depth.causal=classifier")
EQUAL = "equal scores: the earlier token passes; loss-free"
CASES = [
    Case("dense, predictor", (*DEEP, "model.ffn.num_experts=0"), padding="uneven"),
    Case("experts inside, capacity of the chosen per sequence, losses per sequence and over the step",
         (*CLASSIFIER, "capacity.kind=factor", "capacity.factor=0.8", "model.ffn.num_shared_experts=1",
          "balance.aux.scope=sequence"), padding="uneven"),
    Case("every block, sigmoid, experts in the second, capacity over the batch by places, one module ahead",
         (*DEEP, "model.depth.every=1", "model.depth.weight=sigmoid", "model.ffn.every=2", "model.mtp.depth=1",
          "router.jitter=0.2", "capacity.kind=factor", "capacity.factor=0.8", "capacity.scope=global",
          "capacity.policy=random"), padding="whole ranks"),
    Case(EQUAL,
         (*CLASSIFIER, "balance.loss_free.rate=0.05", "router.kind=sigmoid"), zero_router=True, padding="uneven"),
    Case("coupled networks, latent attention", ("model=graph_tiny", *DEEP, "model.attention.kind=mla",
         "model.attention.kv_rank=5", "model.attention.nope_dim=4", "model.attention.rope_dim=8",
         "model.attention.v_dim=3", "model.attention.rope_theta=100.0"), padding="uneven"),
    Case("experts in attention and in the layer, dropped at random, entropy of both over the step",
         (*DEEP, *SWITCHHEAD, "model.attention.entropy=0.1", "balance.entropy.coef=0.1", "router.kind=sigmoid"),
         padding="uneven"),
    Case("every block, experts in attention and no others, positions learned",
         (*CLASSIFIER, *SWITCHHEAD, "model.depth.every=1", "model.ffn.num_experts=0", "model.positions=learned",
          "model.max_positions=6"), padding="whole ranks"),
    Case("no-op experts inside, loss-free, capacity of the chosen per sequence",
         (*DEEP, *NOOP, "balance.loss_free.rate=0.1", "capacity.kind=factor", "capacity.factor=0.7"), start_bias=0.3,
         padding="uneven"),
    Case("every block, no-op experts and experts in attention, rerouted over the batch, one module ahead",
         (*CLASSIFIER, *NOOP, *SWITCHHEAD, "model.depth.every=1", "model.mtp.depth=1", "capacity.kind=factor",
          "capacity.factor=0.7", "capacity.scope=global", "capacity.reroute=true"), padding="uneven"),
]  # fmt: skip
ALL = {1: [(1, 1, 1), (1, 1, 4)], 2: [(1, 1, 1), (2, 1, 4), (1, 2, 1)], 4: [(2, 1, 1), (4, 1, 4), (2, 2, 1)]}
FEW = {1: [(1, 1, 1)], 2: [(2, 1, 4)]}
"""(ep, dp_shard, accumulation) by world size."""


def truths_of(world, cases):
    """Each rank asks the oracle for its share of the cases."""
    own = {
        c.name: oracle.train(c.config(), c.whole_model(), c.batches(), RATES) for c in cases[world.rank :: world.size]
    }
    parts = [None] * world.size
    dist.all_gather_object(parts, own)
    return {name: truth for part in parts for name, truth in part.items()}


def wrong_on(world, cases, layouts, truths):
    """The truths; what differs from them on this rank, or by recomputation; what an evaluation says."""
    torch.set_num_threads(1)
    truths = truths or truths_of(world, cases)
    wrong, looked = {}, {}
    for ep, dp_shard, accumulation in layouts:
        mesh = build_mesh(world, ep, dp_shard)
        for case in cases:
            # What counts over the batch must not be cut: the oracle has it in one piece.
            passes = accumulation if case.split(1, accumulation) == oracle.Split() else 1
            found = run_layout(mesh, case, passes)
            wrong[case.name, ep, dp_shard, accumulation] = differences(found, truths[case.name], 1e-10)
            if dp_shard == 1:
                looked[case.name, ep] = evaluated(mesh, case, world)
        plain, *again = (run(cases[1], mesh, remat(mode)) for mode in ("none", *MODES))
        wrong["recomputed", ep, dp_shard] = [line for ran in again for line in bit_differences(ran, plain)]
    return truths, {key: lines for key, lines in wrong.items() if lines}, looked


def evaluated(mesh, case, world):
    """Losses of both choices over the whole batch, each rank with other sequences; and how many tokens it took."""
    model = torch_engine(mesh, case, "fp64").model.eval()
    (batch,) = rank_batches(case.batches()[0], world.rank, world.size, 1)
    inputs = to_inputs(batch, model, mesh, seed=0)
    sums = []
    with torch.no_grad():
        causal = model(inputs.tokens_BS, inputs.context, [inputs.labels_BS])
        with looking_ahead(model):
            ahead = model(inputs.tokens_BS, inputs.context, [inputs.labels_BS])
        for losses in (causal, ahead):
            total = losses.loss_sums[0].clone()
            dist.all_reduce(total)
            sums.append(total.item())
    return sums, [int(record.taken) for record in causal.records if isinstance(record, DepthRecord)]


def check(cases, layouts):
    """Every layout does what the oracle does, and evaluates to what one rank does; ranks take unequal numbers."""
    ((truths, wrong, whole),) = run_ranks(wrong_on, 1, cases, layouts[1], None, timeout_s=600)
    assert wrong == {}
    unequal = False
    for size in layouts.keys() - {1}:
        results = run_ranks(wrong_on, size, cases, layouts[size], truths, timeout_s=600)
        for _, wrong, looked in results:
            assert wrong == {}
            for (name, _), (sums, _) in looked.items():
                assert sums == pytest.approx(whole[name, 1][0], rel=1e-11)
        unequal |= len({str(looked[cases[0].name, layouts[size][0][0]][1]) for _, _, looked in results}) > 1
    assert unequal
    for (name, _), (sums, taken) in whole.items():
        if name != EQUAL:  # there nobody is willing, and nobody's gate is open
            assert sum(taken) > 0 and sums[0] != pytest.approx(sums[1], rel=1e-6), name
    for case in cases:
        gradients = truths[case.name].gradients
        own = {name: g for name, g in gradients.items() if name.startswith("blocks.1.router.")}
        assert own and all(g.abs().max() > 1e-9 for g in own.values()), case.name


def test_two_ranks_equal_the_oracle_and_evaluate_alike():
    check(CASES[:2], FEW)


@pytest.mark.slow
def test_every_layout_equals_the_oracle_and_evaluates_alike():
    check(CASES, ALL)
