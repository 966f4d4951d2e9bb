"""A graph-coupled model through every command: trained on two ranks, resumed, evaluated, exported, taken further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launch import records, run

LENGTH = 32
ORIGINAL = [
    "model=graph_original", "model.vocab_size=null", "model.dim=32", "model.layers=2", "model.heads=2",
    "model.ffn.expert_dim=16", f"model.max_positions={LENGTH}",
]  # fmt: skip
NETWORKS = ["model=graph_tiny", "model.ffn.graph.pooling=weighted", "model.ffn.graph.max_neighbors=2"]
KINDS = {"original": ORIGINAL, "networks": NETWORKS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_a_graph_coupled_model(kind: str, tiny: list[str], tmp_path: Path) -> None:
    # The original has sizes of its own, and no fewer keys than queries.
    settings = [*KINDS[kind], *(word for word in tiny if kind == "networks" or not word.startswith("model."))]
    started = [*settings, "run.dir=first", "checkpoint.every=2"]
    run("train", [*started, "train.steps=2", "parallel.ep=2"], tmp_path, ranks=2)
    run("train", [*started, "train.steps=4"], tmp_path)
    steps = records(tmp_path / "first", "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all("moe/layer_01/similarity" in record for record in steps)

    figures = json.loads(run("evaluate", ["run.dir=first", "eval.batches=2"], tmp_path).stdout)
    assert figures["step"] == 4 and 0 < figures["loss"] < 7

    prompt = "word " * LENGTH
    asked = ["run.dir=first", f"prompt='{prompt}'", "sample.temperature=0", "sample.max_tokens=3"]
    assert run("generate", asked, tmp_path).stdout.startswith(prompt)

    told = run("export", ["run.dir=first", "to=public"], tmp_path)
    assert "no class of transformers loads this layout" in told.stdout + told.stderr
    public = json.loads((tmp_path / "public" / "config.json").read_text())
    trained = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())["model"]
    assert public["model_type"] == "moe_train" and public["model"]["ffn"]["graph"] == trained["ffn"]["graph"]
    common = [word for word in settings if not word.startswith(("model", "tokenizer"))]
    adopt = ["model=pretrained", "model.init_from=public", "tokenizer=file", "tokenizer.path=public/tokenizer.json"]
    run("train", [*common, *adopt, "run.dir=second", "train.steps=1"], tmp_path)
    first, again = steps[0]["loss"], records(tmp_path / "second", "train")[0]["loss"]
    assert again < first - 0.01, "it goes on from what was learned, on the same text"
