"""The layout contract: every figure of a step, every gradient (routers included), the gradient norm, weights and biases
after three steps are the same on every layout, and equal to the plain token-by-token oracle (fp64, 1e-10)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import oracle
import pytest
import torch
import torch.distributed as dist
from layout_cases import ARCHITECTURES, CASES, DEPENDS_ON_LAYOUT, GRAPH, MIXED, ON_ALL_LAYOUTS
from layouts import BATCH, RATES, differences, run_layout
from spawn import run_ranks

from moe_train.config.rules import layout_problems
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World, joined

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
ALL = {1: [(1, 1), (1, 4)], 2: [(1, 1), (2, 4)], 4: [(1, 1), (2, 1), (4, 1), (1, 4), (4, 4)]}
"""(ep, accumulation) by world size, for the plain cases and for both kinds of coupled experts."""
FEW = {1: [(1, 1)], 2: [(1, 4)], 4: [(2, 1), (4, 4)]}
"""For the others: each value once; `test_layout_product` runs every combination of options on every EP size."""
NAMES = {case.name: case for case in CASES}
FP32 = NAMES["top-2, global balance"]


def layouts_of(case, size):
    """(ep, accumulation) on which a case is run."""
    return (ALL if case in ON_ALL_LAYOUTS else FEW)[size]


def share_of_truths(world, jobs):
    """The truths by case and split, each rank having asked the oracle for its share of them."""
    own = {
        (case.name, split): oracle.train(case.config(), case.whole_model(), case.batches(), RATES, split)
        for case, split in jobs[world.rank :: world.size]
    }
    parts = [None] * world.size
    dist.all_gather_object(parts, own)
    return {key: truth for part in parts for key, truth in part.items()}


def wrong_on(world, cases, truths):
    """What differs from the truth on this rank, by case and layout."""
    torch.set_num_threads(1)
    meshes = {ep: build_mesh(world, ep) for ep in (1, 2, 4) if ep <= world.size}
    return {
        (case.name, world.size, ep, accumulation): differences(
            run_layout(meshes[ep], case, accumulation), truths[case.name, case.split(world.size, accumulation)], 1e-10
        )
        for case in cases
        for ep, accumulation in layouts_of(case, world.size)
    }


def truths_and_wrong_on(world, cases, jobs, truths):
    torch.set_num_threads(1)
    truths = truths | share_of_truths(world, jobs)
    return truths, wrong_on(world, cases, truths)


def wrong_also_in_fp32(world, cases, truths):
    truth = truths[FP32.name, oracle.Split()]
    in_fp32 = [run_layout(build_mesh(world, ep), FP32, 1, torch.float32) for ep in (1, 2, 4)]
    return wrong_on(world, cases, truths), [differences(found, truth, 1e-5) for found in in_fp32]


@dataclass
class Results:
    """All that was run.

    Attributes:
        truths: by case and split.
        wrong: what differs from the truth on any rank, by case, world size, EP size and accumulation.
        in_fp32: the same of one case in fp32, by rank and EP size.
    """

    truths: dict
    wrong: dict
    in_fp32: list


def halves(cases):
    """Every other case, and the rest."""
    return cases[::2], cases[1::2]


@pytest.fixture(scope="module")
def results():
    """Every case on its layouts; processes are started as seldom as can be."""
    jobs = {(case, case.split(size, m)) for case in CASES for size in ALL for _, m in layouts_of(case, size)}
    jobs = sorted(jobs, key=lambda job: (job[0].name, job[1].passes, job[1].ranks))
    with joined(dist.HashStore(), alone := World(0, 1, torch.device("cpu"), 30.0)):
        mesh = build_mesh(alone, 1)
        truths = {(c.name, split): run_layout(mesh, c, split.passes) for c, split in jobs if c.truth == "one rank"}
    by_oracle = [job for job in jobs if job[0].truth == "oracle"]
    on_2 = run_ranks(truths_and_wrong_on, 2, CASES, by_oracle, truths, timeout_s=600, collective_timeout_s=600)
    truths = on_2[0][0]
    on_4 = run_ranks(wrong_also_in_fp32, 4, CASES, truths, timeout_s=600)
    with ThreadPoolExecutor(2) as pool:  # two single ranks at once, each in a world of its own
        on_1 = [*pool.map(lambda cases: run_ranks(wrong_on, 1, cases, truths, timeout_s=600)[0], halves(CASES))]
    wrong = {}
    for part in [*on_1, *(wrong for _, wrong in on_2), *(wrong for wrong, _ in on_4)]:
        for key, lines in part.items():
            wrong.setdefault(key, []).extend(lines)
    return Results(truths, wrong, [in_fp32 for _, in_fp32 in on_4])


@pytest.fixture(scope="module")
def truths(results):
    return results.truths


@pytest.fixture(scope="module")
def wrong(results):
    return results.wrong


def said_of(wrong, *names, only=lambda size, ep, accumulation: True, about=""):
    """What is wrong with these cases on those layouts; there must be such layouts."""
    keys = [key for key in wrong if key[0] in names and only(*key[1:])]
    assert {key[0] for key in keys} == set(names), "a case is not run on such a layout"
    return {key: lines for key in keys if (lines := [line for line in wrong[key] if about in line])}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_equals_the_oracle(wrong, case):
    assert said_of(wrong, case.name) == {}


def test_every_parameter_of_the_published_architectures_and_of_coupled_experts_has_a_gradient(truths):
    for case in [*ARCHITECTURES, *GRAPH]:
        gradients = truths[case.name, case.split(1, 1)].gradients
        assert [name for name, g in gradients.items() if not g.abs().max() > 1e-9] == [], case.name


def test_the_cases_drop_and_reroute(truths):
    """A rule that refuses nothing shows nothing."""
    for (name, _), truth in truths.items():
        rule = NAMES[name].config().model.ffn.capacity
        last = {key.split("/")[-1]: value for key, value in truth.figures[-1].items()}
        if rule.kind != "dropless" and "base" not in name:  # which has no overflow
            assert last["dropped_fraction"] + last["rerouted_fraction"] > 0.01, name
        if getattr(rule, "reroute", False):
            assert last["rerouted_fraction"] > 0.01, name


def test_what_counts_over_a_rank_does_depend_on_the_layout(truths):
    """So that it is right not to claim the contract for it."""
    for case in DEPENDS_ON_LAYOUT:
        whole, cut = truths[case.name, case.split(1, 1)], truths[case.name, case.split(4, 4)]
        assert differences(whole, cut, 1e-4), case.name


def test_trap_1_expert_router_and_dense_gradients_do_not_depend_on_expert_parallelism(wrong):
    def at_world_4(size, ep, accumulation):
        return size == 4 and accumulation == 1

    assert said_of(wrong, *NAMES, only=at_world_4, about="gradients") == {}


def test_trap_2_accumulation_with_uneven_valid_tokens(wrong, truths):
    names = [case.name for case in CASES if case.padding == "uneven"]
    labels_BS = NAMES[names[0]].batches()[0][1]
    per_micro_batch = (labels_BS != oracle.IGNORE).view(16, -1).sum(dim=1)
    assert len(per_micro_batch.unique()) > 2
    assert said_of(wrong, *names, only=lambda size, ep, accumulation: accumulation == 4) == {}


def test_trap_3_gradient_norm_is_equal_on_every_rank_and_counts_each_expert_once(wrong, truths):
    gradients = truths["top-2, global balance", oracle.Split()].gradients
    assert sum(g.norm() > 0 for name, g in gradients.items() if ".experts." in name) == 4
    assert said_of(wrong, *NAMES, about="norm of step") == {}


def test_trap_5_expert_data_group_of_one_rank_with_accumulation(wrong):
    def lonely(size, ep, accumulation):
        return size == ep > 1 and accumulation > 1

    assert said_of(wrong, *NAMES, only=lonely) == {}


@pytest.mark.parametrize("case", [case for case in CASES if "no loss" in case.name], ids=str)
def test_trap_6_router_learns_from_the_task_alone_in_every_dispatcher(wrong, truths, case):
    assert case.config().model.ffn.balance.aux is None
    truth = truths[case.name, case.split(1, 1)]
    routers = {name: g for name, g in truth.gradients.items() if ".router." in name}
    assert routers
    assert all(g.abs().max() > 1e-6 for g in routers.values())
    assert said_of(wrong, case.name, about=".router.") == {}


IDLE = "all tokens to one expert for good, ranks without valid tokens"


def test_trap_7_experts_without_tokens_have_zero_gradients_and_decay_as_elsewhere(wrong, truths):
    truth, case = truths[IDLE, oracle.Split()], NAMES[IDLE]
    name, decay = "blocks.0.ffn.experts.gate_up_LDF2", case.config().optim.weight_decay
    start_LDF2 = dict(case.whole_model().named_parameters())[name].detach()
    idle = [e for e in range(4) if not truth.gradients[name][e].any()]
    assert len(idle) == 3
    expected = start_LDF2[idle] * math.prod(1 - rate * decay for rate in RATES)
    torch.testing.assert_close(truth.weights[name][idle], expected)
    assert said_of(wrong, IDLE, about=name) == {}


@pytest.mark.parametrize("key", ["aux", "z_loss", "importance_load", "device", "communication"])
def test_trap_9_gradient_of_each_balance_loss_is_that_of_the_textbook(wrong, truths, key):
    cases = [case for case in CASES if getattr(case.config().model.ffn.balance, key) is not None]
    assert said_of(wrong, *(case.name for case in cases), about=".router.") == {}
    case = next(case for case in cases if case in MIXED)
    balance = case.config().model.ffn.balance
    coefs = {name: 0.0 for name in type(getattr(balance, key)).model_fields if "coef" in name}
    without = replace(case, overrides=(*case.overrides, *(f"balance.{key}.{name}=0.0" for name in coefs)))
    shares = [oracle.train(c.config(), c.whole_model(), c.batches()[:1], RATES[:1]).gradients for c in (case, without)]
    assert max(float((shares[0][n] - shares[1][n]).abs().max()) for n in shares[0] if ".router." in n) > 1e-5


def test_trap_10_with_equal_counts_on_all_ranks_aux_over_the_step_is_aux_over_the_micro_batch(wrong, truths):
    over_step, over_micro = (f"equal counts on all ranks, aux over the {scope}" for scope in ("step", "micro-batch"))
    assert differences(truths[over_step, oracle.Split()], truths[over_micro, oracle.Split(4, 4)], 1e-12) == []
    assert said_of(wrong, over_step, over_micro) == {}


def test_trap_16_bias_moves_once_per_step_by_the_counts_of_all_ranks_and_micro_batches(wrong, truths):
    name = "sigmoid, loss-free by sign, aux per sequence, global random in choice order"
    rate = NAMES[name].config().model.ffn.balance.loss_free.rate
    for passes in (1, 4):
        for bias_E in truths[name, oracle.Split(passes)].biases.values():
            moves_E = bias_E / rate
            torch.testing.assert_close(moves_E, moves_E.round())
            assert 0 < moves_E.abs().max() < len(RATES) + 0.5
    assert said_of(wrong, name, about="bias") == {}


def test_trap_20_bias_decides_who_is_chosen_but_is_in_no_weight(wrong, truths):
    case = NAMES["topk, loss-free with a bias that decides"]
    unbiased = oracle.train(case.config(), replace(case, start_bias=0.0).whole_model(), case.batches()[:1], RATES[:1])
    loads = [truth.figures[0]["moe/layer_00/load"] for truth in (unbiased, truths[case.name, oracle.Split()])]
    assert max(abs(a - b) for a, b in zip(*loads, strict=True)) > 0.05
    assert said_of(wrong, case.name) == {}


def test_trap_21_ranks_that_send_nothing_and_ranks_that_receive_nothing(wrong, truths):
    truth = truths[IDLE, oracle.Split()]
    assert [figures["moe/layer_00/dead_experts"] for figures in truth.figures] == [3, 3, 3]
    assert (NAMES[IDLE].batches()[0][1][: BATCH // 2] == oracle.IGNORE).all()
    assert said_of(wrong, IDLE, only=lambda size, ep, accumulation: ep == 4) == {}


def test_trap_22_all_tokens_to_one_expert_and_as_many_choices_as_experts(wrong):
    assert said_of(wrong, "all tokens to one expert", "top_k = num_experts, weights scaled") == {}


def test_trap_22_experts_that_do_not_divide_over_the_ranks_are_refused():
    (problem,) = layout_problems(ep=4, num_experts=6, world_size=4)
    assert (problem.key, problem.value) == ("parallel.ep", 4)
    assert "6" in problem.rule


def test_trap_37_modules_ahead_are_measured_with_and_without_experts_in_the_layers(wrong):
    names = [case.name for case in ARCHITECTURES if case.config().model.mtp.depth]
    assert {NAMES[name].config().model.ffn.num_experts for name in names} == {0, 4, 8}
    assert said_of(wrong, *names) == {}


def test_fp32_holds_to_1e5(results):
    assert results.in_fp32 == [[[], [], []]] * 4
