"""What a forward pass keeps, and the most that a step needs, are what the closed forms say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from moe_train.bench import on_ranks
from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.data.loader import Batch
from moe_train.dist.world import World, joined
from moe_train.parallel.activations import activation_bytes, blocks_in_sight, recomputed_bytes, working_bytes
from moe_train.parallel.memory import memory_per_rank
from moe_train.training.step import StepSettings, train_step

VOCAB = 512
SEQUENCES, LENGTH = 8, 256
MODELS = {
    "routed": ("model=sparse_tiny",),
    "routed, shared expert, every other layer": (
        "model=sparse_tiny", "model.ffn.num_shared_experts=1", "model.ffn.every=2", "model.attention.window=100",
    ),
    "dense": ("model=dense_tiny",),
}  # fmt: skip
CASES = list(itertools.product(MODELS, ("fp32", "bf16"), ("none", "selective", "full")))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with joined(dist.HashStore(), alone := World(0, 1, torch.device("cpu"), 30.0)):
        yield alone


def config_of(model: str, precision: str, remat: str) -> TrainConfig:
    # Which kernel attention takes must not depend on where this runs.
    own = [f"train.precision={precision}", f"parallel.remat={remat}", "model.layers=2"]
    own += ["model.attention.compute=" + ("products" if precision == "bf16" else "fused")]
    return compose_config("train", TrainConfig, train_problems, [*MODELS[model], *own])


def batch() -> Batch:
    tokens_BS = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous(), first_sequence=0)


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def kept_by_nodes(loss: Tensor) -> Iterator[Tensor]:
    """What autograd's own functions hold without telling the hooks: gradients made in the forward pass."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            yield from tensors_in(value)
        waiting += [following for following, _ in node.next_functions]


def measured_kept(config: TrainConfig, world: World) -> int:
    """Bytes of all storages that the backward pass will want, but for the parameters'."""
    _, engine = on_ranks(config, world, VOCAB)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    one = batch()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = engine.model(one.tokens_BS, None, [one.labels_BS])
    kept += kept_by_nodes(losses.loss_sums[0])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for parameter in engine.model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(("model", "precision", "remat"), CASES)
def test_a_forward_pass_keeps_what_the_closed_form_says(model: str, precision: str, remat: str, world: World) -> None:
    """Two in a hundred: how far segments of experts are filled up is known only when they are routed."""
    config = config_of(model, precision, remat)
    tokens = SEQUENCES * LENGTH
    expected = activation_bytes(config.model, VOCAB, tokens, LENGTH, precision, remat, precision == "bf16")
    assert measured_kept(config, world) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("model", "precision", "remat"), CASES)
def test_a_step_needs_what_the_closed_forms_say(model: str, precision: str, remat: str, world: World) -> None:
    """State, what is kept, what is made again, room for one part: they are not all largest at the same moment."""
    config = config_of(model, precision, remat)
    mesh, engine = on_ranks(config, world, VOCAB)
    step = partial(train_step, engine, mesh, [batch()], SEQUENCES * LENGTH, StepSettings(1e-3, 1.0, seed=0))
    step()  # moments exist from here on
    tracker = MemTracker()
    tracker.track_external(engine.model, engine.optimizer)
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    layout, tokens, by_products = mesh.layout, SEQUENCES * LENGTH, precision == "bf16"
    expected = memory_per_rank(config.model, VOCAB, layout, precision).state_bytes
    expected += activation_bytes(config.model, VOCAB, tokens, LENGTH, precision, remat, by_products)
    expected += recomputed_bytes(config.model, tokens, LENGTH, precision, remat, by_products)
    expected += working_bytes(config.model, tokens, LENGTH, precision, by_products)
    assert 0.78 * expected < peak < 1.12 * expected


def test_blocks_of_queries_see_what_lies_before_them() -> None:
    assert blocks_in_sight(300, None) == [(128, 128), (128, 256), (44, 300)]
    assert blocks_in_sight(300, 100) == [(128, 128), (128, 256 - 29), (44, 300 - 157)]
