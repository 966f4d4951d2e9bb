"""Graph-coupled models in our own layout: two ranks that share the experts write what one writes, and read it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spawn import run_ranks

from moe_train.config.model import ModelConfig
from moe_train.config.schema import ExportConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.mesh import build_mesh
from moe_train.dist.world import World
from moe_train.interop.publish import Subject, preflight, publish
from moe_train.interop.start import load_first_weights
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import exchange_for

pytestmark = pytest.mark.slow
EP = (1, 2)
KINDS = ("ffn", "block")
VOCAB = Tokenizer.of_bytes().vocab_size


def config_of(kind: str, init_from: str | None = None) -> ModelConfig:
    return ModelConfig.model_validate({
        "dim": 16, "layers": 2, "heads": 2, "norm": "layer", "positions": "learned", "max_positions": 8,
        "init_std": 0.4, "attention": {"kind": "gqa", "qkv_bias": True}, "init_from": init_from,
        "ffn": {"num_experts": 4, "expert_dim": 12, "expert_bias": True, "graph": {"expert": kind}},
    })  # fmt: skip


def logits(model: Transformer) -> torch.Tensor:
    """Of a few tokens; all ranks compute together."""
    tokens_BS = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens_BS).logits_BSV
    return found


def write_and_read(world: World, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Logits of the models that were written and of those that were read, by their layouts."""
    results = {}
    meshes = {ep: build_mesh(world, ep) for ep in EP}
    for ep, mesh in meshes.items():
        model = build_model(config_of(kind), VOCAB, exchange_for(mesh, 4, False), "fp64", world.device)
        initialise(model, 0)
        results[f"written by ep{ep}"] = logits(model)
        content = {"model": config_of(kind), "data": {"seq_len": 8}, "train": {"precision": "fp64"}}
        subject = Subject(TrainConfig.model_validate(content), Tokenizer.of_bytes(), model, mesh, folder, 1)
        export = ExportConfig.model_validate({"run": {"dir": "run"}, "to": str(folder / f"{kind}-ep{ep}")})
        publish(export, preflight(export, config_of(kind)), subject, world)
    for wrote in EP:
        for ep, mesh in meshes.items():
            config = config_of(kind, str(folder / f"{kind}-ep{wrote}"))
            model = build_model(config, VOCAB, exchange_for(mesh, 4, False), "fp64", world.device)
            initialise(model, 5)
            load_first_weights(model, world, seed=0)
            results[f"ep{wrote} read by ep{ep}"] = logits(model)
    return results


def scenario(world: World, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    world.leader_first(lambda: Tokenizer.of_bytes().save(folder / "tokenizer.json"))
    return {kind: write_and_read(world, folder, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, torch.Tensor]]]]:
    folder = tmp_path_factory.mktemp("graph-folders")
    return folder, run_ranks(scenario, 2, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_do_not_depend_on_the_layout(ran, kind: str) -> None:
    found = []
    for ep in EP:
        files = (ran[0] / f"{kind}-ep{ep}").glob("*.safetensors")
        found.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert len([name for name in found[0] if name.endswith(".3")]) >= 4 * 2, "the last expert's, of both layers"


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_computes_what_was_written(ran, kind: str) -> None:
    """Files hold fp32; initial values are drawn in it."""
    for results in ran[1]:
        wanted = results[kind]["written by ep1"]
        assert len(results[kind]) == 2 + 4
        for case, found in results[kind].items():
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=case)
