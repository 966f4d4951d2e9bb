"""Texts that are remembered, over ranks: experts sharded, all weights sharded; every rank continues the same text."""

from __future__ import annotations

import pytest
import torch
from continued_texts import MODELS, PROMPT, VOCAB, WHOLE, built, config_of, filled, padded, prompt, sample, scores
from spawn import run_ranks

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.inference.sampler import can_remember, generate
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.shard import shard

CASES = [*MODELS, *WHOLE]
SHARDED = ["sparse, two key heads", "latent", "coupled experts"]
LAYOUTS = [*((name, 2, 1) for name in CASES), *((name, ep, 2) for name in SHARDED for ep in (1, 2))]
"""Case, ranks over which experts lie, ranks over which weights are sharded."""
FURTHER = 5
"""Tokens after the prompt: more show nothing that one rank does not."""
Continued = tuple[torch.Tensor, list[int]]


def on_ranks(mesh: Mesh, name: str) -> Transformer:
    """This rank's part of a model."""
    config = config_of(*(MODELS | WHOLE)[name])
    exchange = exchange_for(mesh, config.ffn.num_experts, padded(config))
    model = filled(build_model(config, VOCAB, exchange, "fp64", torch.device("cpu")))
    if mesh.sharding is not None:
        shard(model, mesh)
    return model


def continued(model: Transformer) -> list[Continued]:
    """Scores of one text and another text, with memory and without."""
    ways = (can_remember(model.config), False)
    return [
        (
            scores(model, prompt(PROMPT + FURTHER), way),
            generate(model, prompt(), sample(FURTHER, temperature=1.0), VOCAB, 64, way),
        )
        for way in ways
    ]


def on_every_layout(world: World) -> dict[tuple[str, int, int], list[Continued]]:
    torch.set_num_threads(1)
    return {(name, ep, dp): continued(on_ranks(build_mesh(world, ep, dp), name)) for name, ep, dp in LAYOUTS}


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[str, int, int], list[Continued]]]:
    return run_ranks(on_every_layout, 2, timeout_s=280.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_finds_what_one_rank_finds(
    layout: tuple[str, int, int], found: list[dict[tuple[str, int, int], list[Continued]]]
) -> None:
    expected_SV, expected = continued(built((MODELS | WHOLE)[layout[0]]))[1]
    for of_rank in found:
        for scores_SV, text in of_rank[layout]:
            assert (scores_SV - expected_SV).abs().max() <= 1e-10 * expected_SV.abs().max()
            assert text == expected
