"""Where experts live changes no result: a run whose experts move is the run without, resumes bit for bit, and its
checkpoints load into any other layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layout_cases import EIGHT, ahead, factor, ffn, loss, router
from layouts import RATES, Case, differences, rank_batches, torch_engine
from oracle import BOUNDARY, IGNORE, Truth
from spawn import run_ranks
from torch import Tensor

from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.reader import open_at
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World, joined
from moe_train.moe.roles import roles_of
from moe_train.parallel.engine import Engine
from moe_train.parallel.state import part_of
from moe_train.training.placement import Decision, Rebalancer
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

pytestmark = pytest.mark.timeout(600)
CASES = [
    Case("bias, shared experts, two layers",
         (*loss("loss_free", "rate=0.05"), *ffn("num_experts=8", "num_shared_experts=1", "expert_bias=true")),
         start_bias=0.2, padding="uneven"),
    Case("padded buffers, rerouted, renormalised",
         (*EIGHT, *factor(0.8, "pad=true", "policy=probability", "reroute=true", "renormalize=after"))),
    Case("noise, rerouted over the batch, one module ahead",
         (*EIGHT, *router("noisy_topk"), *factor(0.8, "scope=global", "reroute=true"), *ahead(1))),
]  # fmt: skip
SKEWED = Case("all tokens to the first experts", (*EIGHT,), zero_router=True)
LAYOUTS = [(2, 1), (4, 1), (2, 2)]
"""(ep, dp_shard) on four ranks."""
FIRST, LAST = 2, 5
"""Steps after which experts move, and of the whole run."""
ORDERS = [(5, 2, 7, 0, 1, 6, 3, 4), (1, 0, 2, 3, 6, 7, 4, 5)]
"""Expert at each place, of even and odd layers: over all ranks, and within a rank too."""


@dataclass
class Life:
    """One life of a run, from a step on.

    Attributes:
        engine: model and optimizer.
        rebalancer: the places.
        truth: what was recorded of its steps.
    """

    engine: Engine
    rebalancer: Rebalancer
    truth: Truth


def begin(mesh: Mesh, case: Case) -> Life:
    engine = torch_engine(mesh, case, "fp64")
    return Life(engine, Rebalancer(engine, mesh), Truth())


def train(life: Life, mesh: Mesh, case: Case, steps: range) -> None:
    batches = [*case.batches(), *case.batches()]
    for step in steps:
        batch, rate = batches[step], RATES[step % len(RATES)]
        tokens = int((batch[1] != IGNORE).sum())
        settings = replace(settings_at(step, case.config(), BOUNDARY), learning_rate=rate)
        micro_batches = rank_batches(batch, mesh.rank, mesh.layout.world_size, 2)
        result = train_step(life.engine, mesh, micro_batches, tokens, settings)
        life.rebalancer.observe(result.tally)
        life.truth.figures.append(result.tally.measure(tokens, mesh))
        life.truth.norms.append(result.grad_norm.item())


def whole(parts: dict[str, Part], mesh: Mesh) -> dict[str, Tensor]:
    """The tensors of all ranks, each expert at its index; what no rank holds is infinite."""
    found = {}
    for key, part in parts.items():
        tensor = torch.full(part.shape, -torch.inf, dtype=torch.float64)
        for box in part.boxes:
            tensor[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.values.shape, strict=True))] = box.values
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=mesh.world)
        found[key] = tensor
    return found


def finished(life: Life, mesh: Mesh) -> Truth:
    """With weights, moments and the last gradients."""
    model = life.engine.model
    roles, num_experts = roles_of(model), model.config.ffn.num_experts
    gradients = {name: part_of(p.grad, roles[name], num_experts) for name, p in model.named_parameters()}
    return replace(life.truth, weights=whole(life.engine.parts(), mesh), gradients=whole(gradients, mesh))


def forced(life: Life) -> Decision:
    """Orders that no load asked for."""
    layers = {}
    for (name, places), order in zip(life.rebalancer.decide(chooses=False).layers.items(), ORDERS, strict=False):
        layers[name] = replace(places, after=order)
    return Decision(layers, starts_anew=True)


def first_and_last_change_places(life: Life) -> Decision:
    """From wherever experts are."""
    layers = {}
    for name, places in life.rebalancer.decide(chooses=False).layers.items():
        first, *others, last = places.before
        layers[name] = replace(places, after=(last, *others, first))
    return Decision(layers, starts_anew=True)


def save(life: Life, world: World, mesh: Mesh, folder: Path, step: int, decision: Decision) -> Path:
    state = CheckpointState(life.engine.parts(), {"layout": decision.state()}, None)
    return CheckpointManager(folder, world, mesh.layout, keep=9).save(step, state)


def resumed(world: World, mesh: Mesh, case: Case, path: Path) -> Life:
    life, checkpoint = begin(mesh, case), open_at(path, world)
    life.rebalancer.restore(checkpoint.trainer["layout"], world.is_leader)
    parts = life.engine.parts()
    checkpoint.fill(parts)
    life.engine.adopt(parts)
    return life


def locals_of(life: Life) -> dict[str, Tensor]:
    return {f"{k} {n}": b.values for k, part in life.engine.parts().items() for n, b in enumerate(part.boxes)}


def unequal(found: dict[str, Tensor], true: dict[str, Tensor]) -> list[str]:
    assert found.keys() == true.keys()
    return [key for key in true if not torch.equal(found[key], true[key])]


def moved_and_not(world: World, folder: Path, case: Case, mesh: Mesh, name: str) -> list[str]:
    """What is wrong in one layout; leaves the checkpoint of the last step, of experts out of place."""
    fixed = begin(mesh, case)
    train(fixed, mesh, case, range(LAST))
    moving = begin(mesh, case)
    train(moving, mesh, case, range(FIRST))
    decision = forced(moving)
    path = save(moving, world, mesh, folder / name, FIRST, decision)
    read = moving.rebalancer.carry_out(decision, open_at(path, world))
    wrong = [f"{read} bytes read"] if read != bytes_of_moves(moving, decision, mesh) else []
    for layer, places in decision.layers.items():
        assert moving.rebalancer.layers[layer].placement.experts == places.after
    train(moving, mesh, case, range(FIRST, LAST))
    truth = finished(fixed, mesh)
    wrong += differences(finished(moving, mesh), truth, 1e-10)
    again = resumed(world, mesh, case, path)
    train(again, mesh, case, range(FIRST, LAST))
    wrong += [f"resumed: {key}" for key in unequal(locals_of(again), locals_of(moving))]
    path = save(moving, world, mesh, folder / name, LAST, again.rebalancer.decide(chooses=False))
    saved = whole(moving.engine.parts(), mesh)
    if world.is_leader:
        torch.save(saved, folder / f"{name}.pt")
    again.rebalancer.carry_out(first_and_last_change_places(again), open_at(path, world))
    return wrong + [f"moved again: {key}" for key in unequal(whole(again.engine.parts(), mesh), saved)]


def bytes_of_moves(life: Life, decision: Decision, mesh: Mesh) -> int:
    """Weights and two moments of each expert that moves, once for each group of ranks that hold it between them."""
    model, total = life.engine.model, 0
    copies = mesh.layout.world_size // mesh.layout.ep // mesh.layout.expert_shard
    for name, places in decision.layers.items():
        experts = life.rebalancer.layers[name].experts
        held = len(places.after) // mesh.layout.ep
        per_expert = sum(p.numel() // held for p in experts.parameters()) * 8
        total += 3 * per_expert * len(places.moved) * copies
    assert total > 0 and model is not None
    return total


def all_moved_and_not(world: World, folder: Path) -> dict[str, list[str]]:
    wrong = {}
    for ep, dp_shard in LAYOUTS:
        mesh = build_mesh(world, ep, dp_shard)
        for number, case in enumerate(CASES if dp_shard == 1 else CASES[:1]):
            name = f"case{number}_ep{ep}_shard{dp_shard}"
            wrong[name] = moved_and_not(world, folder, case, mesh, name)
    return wrong | loaded_elsewhere(world, folder) | {f"chosen at {ep}": chosen(world, folder, ep) for ep in (2, 4)}


def loaded_elsewhere(world: World, folder: Path) -> dict[str, list[str]]:
    """What is not exactly as saved at other EP and world sizes."""
    wrong = {}
    for ep in (1, 2, 4):
        if world.size % ep:
            continue
        mesh = build_mesh(world, ep)
        for path in sorted(folder.glob("case*.pt")):
            case = CASES[int(path.stem[4])]
            life = resumed(world, mesh, case, folder / path.stem)
            has_saved = life.rebalancer.layers["layer_00"].placement.experts != tuple(range(8))
            found = unequal(whole(life.engine.parts(), mesh), torch.load(path))
            found += ["places"] if has_saved != (f"_ep{ep}_" in path.stem) else []
            wrong[f"{path.stem} on {world.size} at {ep}"] = found
    return wrong


def chosen(world: World, folder: Path, ep: int) -> list[str]:
    """What is wrong with a decision by loads that are known: each token chooses experts 0 and 1, on the first rank."""
    mesh = build_mesh(world, ep)
    life = begin(mesh, SKEWED)
    train(life, mesh, SKEWED, range(1))
    loads = life.rebalancer.loads()
    stays, decision = (life.rebalancer.decide(chooses) for chooses in (False, True))
    (places,) = decision.layers.values()
    assert loads[0] == [96, 96, 0, 0, 0, 0, 0, 0] and places.loads == tuple(loads[0])
    assert stays.state()["loads"] == {"layer_00": loads[0]} and decision.state()["loads"] == {}
    assert not stays.moves and decision.moves and len(places.moved) == 2
    event = decision.event(1)
    figures = [event[key]["layer_00"] for key in ("measured", "fixed", "predicted")]
    path = save(life, world, mesh, folder / f"skewed{ep}", 1, stays)
    again = resumed(world, mesh, SKEWED, path)
    assert again.rebalancer.loads() == loads, "a run that was interrupted goes on counting"
    life.rebalancer.carry_out(decision, open_at(path, world))
    assert life.rebalancer.loads() == [[0] * 8]
    everywhere = [None] * world.size
    dist.all_gather_object(everywhere, places.after)
    wrong = [f"{a} is not {b}" for a, b in pairwise(everywhere) if a != b]
    return wrong + ([str(figures)] if figures != [ep, ep, ep / 2] else [])


def one_moved_and_not(world: World, folder: Path) -> dict[str, list[str]]:
    wrong = moved_and_not(world, folder, CASES[0], build_mesh(world, 2), "case0_ep2_shard1")
    return {"moved": wrong, "chosen": chosen(world, folder, 2)} | loaded_elsewhere(world, folder)


def without_what_is_right(wrong: dict[str, list[str]], number: int) -> dict[str, list[str]]:
    assert len(wrong) == number
    return {key: found for key, found in wrong.items() if found}


@pytest.mark.slow
def test_no_result_depends_on_where_experts_live(tmp_path: Path) -> None:
    for wrong in run_ranks(one_moved_and_not, 2, tmp_path):
        assert without_what_is_right(wrong, 2 + 2) == {}
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        assert without_what_is_right(loaded_elsewhere(world, tmp_path), 1) == {}


@pytest.mark.slow
def test_no_result_depends_on_where_experts_live_on_four_ranks(tmp_path: Path) -> None:
    for wrong in run_ranks(all_moved_and_not, 4, tmp_path, timeout_s=400.0):
        assert without_what_is_right(wrong, 7 + 3 * 7 + 2) == {}
    for wrong in run_ranks(loaded_elsewhere, 2, tmp_path):
        assert without_what_is_right(wrong, 2 * 7) == {}
