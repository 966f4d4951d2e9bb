"""Every router with every balance loss and every capacity rule that the configuration accepts and that claims the
contract: four ranks at EP 1, 2 and 4 do what one process does (fp64, 1e-10). The oracle answers for pairs of them, in
`test_layout_contract`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
import torch.distributed as dist
from layouts import Case, counts_over, differences, run_layout
from spawn import run_ranks

from moe_train.config.model import FFNConfig
from moe_train.config.rules import model_problems
from moe_train.dist.mesh import Layout, Mesh, build_mesh

SEEN = {"jitter": 0.1, "expert_dropout": 0.1}
V2 = {"scores": "softmax", "group_score": "max", "normalize": "none", "groups": 4, "top_groups": 2}
ROUTERS = {
    "topk": (2, {"kind": "topk", **SEEN}),
    "topk_softmax": (2, {"kind": "topk_softmax", "jitter": 0.1}),
    "sigmoid": (1, {"kind": "sigmoid", "normalize": "none", "scale": 2.5, **SEEN}),
    "noisy_topk": (2, {"kind": "noisy_topk", **SEEN}),
    "switch": (1, {"kind": "switch"}),
    "gshard sampled": (2, {"kind": "gshard", "second": "sampled", "dispatch_threshold": 0.5, **SEEN}),
    "group_limited V3": (3, {"kind": "group_limited", "scale": 2.5}),
    "group_limited V2": (3, {"kind": "group_limited", **V2, **SEEN}),
    "expert_choice": (2, {"kind": "expert_choice", "allow_future_leak": True, **SEEN}),
    "hash": (2, {"kind": "hash"}),
    "sinkhorn": (2, {"kind": "sinkhorn", **SEEN}),
    "base": (1, {"kind": "base", "jitter": 0.1}),
    "hierarchical": (4, {"kind": "hierarchical", "groups": 4, "top_groups": 2, **SEEN}),
}
"""Choices per token, and the router."""
BALANCES = {
    "none": {},
    "aux": {"aux": {"coef": 0.1}},
    "aux per sequence, z_loss": {"aux": {"coef": 0.1, "scope": "sequence"}, "z_loss": {"coef": 0.01}},
    "importance_load": {"importance_load": {}},
    "importance": {"importance_load": {"load_coef": 0.0}},
    "device": {"device": {"scope": "global"}},
    "communication per sequence": {"communication": {}},
    "loss_free": {"loss_free": {"rate": 0.1}},
    "loss_free by error, aux per sequence": {
        "loss_free": {"rate": 0.1, "update": "error"},
        "aux": {"scope": "sequence"},
    },
}
CAPACITIES = {"dropless": {"kind": "dropless"}} | {
    f"{policy} per {scope}": {"kind": "factor", "factor": 0.8, "policy": policy, "scope": scope}
    for policy in ("position", "probability", "random")
    for scope in ("sequence", "global")
}
CAPACITIES |= {
    "probability by choice, global": {
        "kind": "factor", "factor": 0.8, "policy": "probability", "order": "choice", "scope": "global",
    },
    "reroute per sequence, padded": {"kind": "factor", "factor": 0.8, "reroute": True, "pad": True},
    "reroute global, renormalised": {
        "kind": "factor", "factor": 0.8, "reroute": True, "scope": "global", "renormalize": "after",
    },
    "probability, padded, renormalised": {
        "kind": "factor", "factor": 0.8, "policy": "probability", "pad": True, "renormalize": "after",
    },
    "device per sequence": {"kind": "device", "factor": 0.9, "exempt_fraction": 0.3},
    "device global": {"kind": "device", "factor": 0.9, "scope": "global", "exempt_fraction": 0.3},
}  # fmt: skip
BASE = Case("base", ("model.layers=1",)).config()


@dataclass(frozen=True)
class Combination(Case):
    """One step of a small model."""

    ffn: FFNConfig = field(default_factory=FFNConfig)
    start_bias: float = 0.3
    padding: str = "uneven"

    def config(self):
        return BASE.model_copy(update={"model": BASE.model.model_copy(update={"ffn": self.ffn})})

    def batches(self):
        return super().batches()[:1]


def combinations():
    """All that the rules accept and that claims the contract."""
    found = []
    for (router, (top_k, keys)), (balance, losses), (capacity, rule) in product(
        ROUTERS.items(), BALANCES.items(), CAPACITIES.items()
    ):
        layer = {"num_experts": 8, "top_k": top_k, "expert_dim": 6, "router": keys, "balance": losses, "capacity": rule}
        case = Combination(f"{router} | {balance} | {capacity}", ffn=FFNConfig.model_validate(layer))
        if not list(model_problems(case.config().model)) and counts_over(case.ffn) != "rank":
            found.append(case)
    return found


def single(world):
    """A mesh of this process alone."""
    own = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    return Mesh(Layout(1, 1), 0, own, own, own)


def compare(world, cases):
    """What differs from one process, by case and EP size; each rank looks at its share of the cases."""
    torch.set_num_threads(1)
    meshes, alone = {ep: build_mesh(world, ep) for ep in (1, 2, 4)}, single(world)
    wrong = {}
    for number, case in enumerate(cases):
        found = {ep: run_layout(mesh, case, 1) for ep, mesh in meshes.items()}
        if number % world.size == world.rank:
            truth = run_layout(alone, case, 1)
            wrong |= {(case.name, ep): differences(found[ep], truth, 1e-10) for ep in meshes}
    return wrong


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_combinations_that_claim_the_contract_hold_it():
    cases = combinations()
    names = {tuple(case.name.split(" | ")) for case in cases}
    for place, table in enumerate((ROUTERS, BALANCES, CAPACITIES)):
        assert {name[place] for name in names} == set(table), "an option is in no combination"
    parts = run_ranks(compare, 4, cases, timeout_s=1700)
    results = {key: lines for part in parts for key, lines in part.items()}
    print(f"{len(cases)} of {len(ROUTERS) * len(BALANCES) * len(CAPACITIES)} combinations claim the contract")
    assert len(results) == 3 * len(cases)
    assert len(cases) > 300
    assert {key: lines for key, lines in results.items() if lines} == {}
