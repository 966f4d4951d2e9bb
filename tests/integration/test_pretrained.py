"""Training goes on from an exported folder: the same loss, sharded or not; a dense folder becomes experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from spawn import run_ranks

from launch import records, run
from moe_train.config.schema import LayoutConfig
from moe_train.data.corpus import open_corpus
from moe_train.data.loader import TrainLoader
from moe_train.dist.world import World
from moe_train.inference.load import load_trained
from moe_train.ops.loss import cross_entropy_sum

SMALL_V3 = [
    "model=deepseek_v3_tiny", "model.dim=32", "model.layers=2", "model.heads=2", "model.attention.q_rank=16",
    "model.attention.kv_rank=8", "model.attention.nope_dim=8", "model.attention.rope_dim=4", "model.attention.v_dim=8",
    "model.ffn.num_experts=8", "model.ffn.top_k=3", "model.ffn.expert_dim=16", "model.ffn.hidden_dim=48",
    "data.seq_len=32", "data.heldout_fraction=0.1", "train.global_batch=8", "optim.warmup_steps=1", "log.every=1",
    "log.wandb.mode=disabled", "eval.every=0", "checkpoint.every=0", "sample.max_tokens=8",
]  # fmt: skip
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Exported:
    """A trained run and the folder made of it."""

    run_dir: Path
    folder: Path
    settings: list[str]


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3", "llama"])
def exported(request: pytest.FixtureRequest, tiny: list[str], data: list[str], tmp_path_factory) -> Exported:
    where = tmp_path_factory.mktemp(request.param)
    settings = [*SMALL_V3, *data] if request.param == "deepseek_v3" else tiny
    model = ["model=dense_tiny", "model.ffn.hidden_dim=48"] if request.param == "llama" else []
    ranks = 1 if request.param == "llama" else 2
    layout = [f"parallel.ep={ranks}"]
    run("train", [*settings, *model, *layout, "train.steps=5", "run.dir=first"], where, ranks)
    run("export", ["run.dir=first", "to=public", *layout], where, ranks)
    assert json.loads((where / "public" / "config.json").read_text())["model_type"] == request.param
    common = [word for word in settings if not word.startswith(("model", "tokenizer"))]
    return Exported(where / "first", where / "public", common)


def first_loss(world: World, run_dir: Path) -> float:
    """The loss of a trained model on the first batch of its data."""
    trained = load_trained(run_dir, "latest", LayoutConfig(), world)
    config = trained.config
    corpus = open_corpus(config.data, config.tokenizer, world.leader_first)
    batch = config.train.global_batch
    with TrainLoader(corpus.train, config.data.seq_len, batch, batch, 0, 1, config.run.seed) as loader:
        (rows,) = loader.next_step()
    trained.model.train()
    with torch.no_grad():
        logits_TV = trained.model(rows.tokens_BS).logits_BSV.flatten(0, 1)
    return float(cross_entropy_sum(logits_TV, rows.labels_BS.flatten())) / rows.labels_BS.numel()


def pretrained(exported: Exported, ep: int, *more: str) -> list[str]:
    tokenizer = ["tokenizer=file", f"tokenizer.path={exported.folder / 'tokenizer.json'}"]
    return [
        "model=pretrained", f"model.init_from={exported.folder}", *tokenizer, *exported.settings, f"parallel.ep={ep}",
        "train.steps=2", f"run.dir=again{ep}", *more,
    ]  # fmt: skip


def test_an_exported_then_imported_model_goes_on_with_the_same_loss(exported: Exported) -> None:
    (truth,) = run_ranks(first_loss, 1, exported.run_dir)
    ranks = [1] if exported.run_dir.parent.name.startswith("llama") else [1, 2]
    for ep in ranks:
        run("train", pretrained(exported, ep), exported.run_dir.parent, ep)
        found = records(exported.run_dir.parent / f"again{ep}", "train")[0]["loss"]
        assert abs(found - truth) <= 1e-5 * truth, f"EP {ep}: {found} is not {truth}"


def test_the_architecture_is_written_into_the_run_and_a_resumed_run_needs_no_folder(
    exported: Exported, tmp_path: Path
) -> None:
    moved = exported.folder.rename(tmp_path / "public")
    here = Exported(exported.run_dir, moved, exported.settings)
    run("train", pretrained(here, 1, "model.attention.rope_theta=500.0"), tmp_path)
    written = yaml.safe_load((tmp_path / "again1" / "config.yaml").read_text())["model"]
    assert written["attention"]["rope_theta"] == 500.0
    assert written["dim"] == 32
    moved.rename(exported.folder)
    kept = exported.folder / "tokenizer.json"
    overrides = [*pretrained(here, 1, "model.attention.rope_theta=500.0", "train.steps=3"), f"tokenizer.path={kept}"]
    run("train", overrides, tmp_path)
    assert [row["step"] for row in records(tmp_path / "again1", "train")] == [1, 2, 3]


@pytest.mark.parametrize("exported", ["mixtral"], indirect=True)
def test_mistakes_are_answered_with_every_problem(exported: Exported, tmp_path: Path) -> None:
    stated = [word for word in pretrained(exported, 1) if word != "model=pretrained"]
    ended = run("train", [*stated, "model=sparse_tiny", "model.dim=64"], tmp_path, status=2)
    assert "model.dim=64" in ended.stderr and "Traceback" not in ended.stderr
    ended = run("train", [*stated, "model=pretrained", "tokenizer=bpe"], tmp_path, status=2)
    assert "tokenizer.kind=bpe" in ended.stderr
    ended = run("train", ["model=pretrained", f"model.init_from={tmp_path}"], tmp_path, status=2)
    assert "config.json" in ended.stderr
    ended = run("train", ["model=pretrained"], tmp_path, status=2)
    assert "model.init_from" in ended.stderr
    assert not (tmp_path / "again1").exists()


@pytest.mark.parametrize("exported", ["llama"], indirect=True)
def test_a_dense_folder_becomes_experts_with_the_same_first_loss(exported: Exported) -> None:
    (truth,) = run_ranks(first_loss, 1, exported.run_dir)
    where = exported.run_dir.parent
    moe = ["model=sparse_tiny", "model.dim=32", "model.layers=2", "model.heads=2", "model.attention.kv_heads=1"]
    for name, expert_dim, top_k in (("copies", 48, 2), ("segments", 24, 4)):
        ffn = [f"model.ffn.expert_dim={expert_dim}", f"model.ffn.top_k={top_k}", "model.ffn.num_experts=8"]
        words = [word for word in pretrained(exported, 2) if word != "model=pretrained"]
        run("train", [*words, *moe, *ffn, f"run.dir={name}"], where, 2)
        found = records(where / name, "train")
        assert abs(found[0]["loss"] - truth) <= 1e-5 * truth, name
        assert found[1]["loss"] < found[0]["loss"] + 0.1
