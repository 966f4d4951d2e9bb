"""Losses over forty steps are those of the plain way, whatever was made faster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
import torch
import torch.distributed as dist

from moe_train.bench import on_ranks
from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.data.loader import Batch
from moe_train.dist.world import World, joined
from moe_train.ops.pointwise import fuse
from moe_train.training.step import StepSettings, train_step

STEPS, SEQUENCES, LENGTH, VOCAB = 40, 4, 48, 64
SIZES = ("model=sparse_tiny", "model.dim=32", "model.heads=4", "model.attention.kv_heads=2", "model.layers=2",
         "model.ffn.expert_dim=24", "model.ffn.num_shared_experts=1", "optim.lr=3e-3")  # fmt: skip
PLAIN = ("model.ffn.compute=reference", "model.attention.compute=fused")
FASTER = {
    "experts in a loop": ("model.ffn.compute=loop",),
    "experts in batches": ("model.ffn.compute=bmm",),
    "experts in groups": ("model.ffn.compute=grouped_mm",),
    "attention by products": ("model.attention.compute=products",),
    "loss in chunks": ("train.loss_chunk=50",),
    "selective recomputation": ("parallel.remat=selective",),
    "full recomputation": ("parallel.remat=full",),
    "as chosen by itself": ("model.ffn.compute=auto", "model.attention.compute=auto"),
}
TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5}
"""Of the layout contract."""
Curve: TypeAlias = Callable[..., tuple[float, ...]]


def batches() -> list[Batch]:
    """Sequences in which much can be learnt: each token follows from the one before, but for every fifth."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(STEPS):
        tokens_BS = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
        for place in range(1, LENGTH + 1):
            if place % 5:
                tokens_BS[:, place] = (tokens_BS[:, place - 1] * 5 + 3) % VOCAB
        made.append(Batch(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous(), step * SEQUENCES))
    return made


@pytest.fixture(scope="module")
def curve() -> Iterator[Curve]:
    """Trains by given keys, each combination once."""
    with joined(dist.HashStore(), alone := World(0, 1, torch.device("cpu"), 30.0)):
        yield functools.cache(functools.partial(losses_of, alone))


def losses_of(world: World, precision: str, *keys: str) -> tuple[float, ...]:
    """The loss of each step, in nats per token."""
    own = [f"train.precision={precision}", *SIZES, *PLAIN, *keys]
    config = compose_config("train", TrainConfig, train_problems, own)
    mesh, engine = on_ranks(config, world, VOCAB)
    tokens, losses = SEQUENCES * LENGTH, []
    for step, batch in enumerate(batches()):
        tally = train_step(engine, mesh, [batch], tokens, StepSettings(3e-3, 1.0, seed=step)).tally
        assert tally.loss_sum is not None
        losses.append(tally.loss_sum.item() / tokens)
    return tuple(losses)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("faster", FASTER)
def test_losses_before_and_after_an_optimisation_are_equal(faster: str, precision: str, curve: Curve) -> None:
    before, after = curve(precision), curve(precision, *FASTER[faster])
    assert before[-1] < before[0] - 0.5, "something is learnt, so that differences would grow"
    assert after == pytest.approx(before, rel=TOLERANCES[precision])


@pytest.mark.slow
def test_losses_with_fused_pointwise_functions_are_equal(curve: Curve) -> None:
    before = curve("fp32")
    try:
        after = curve("fp32", "train.compile=pointwise")
    finally:
        fuse(None)
    assert after == pytest.approx(before, rel=TOLERANCES["fp32"])
