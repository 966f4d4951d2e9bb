"""From a trained run to a folder of which transformers makes the same model and the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import Ended, checkpoint_path, run, tensors_of

STEPS = 6
PROMPT = "Once upon"


@pytest.fixture(scope="module")
def run_dir(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    # Large random weights: a model that has hardly learned would write the most common sign again and again.
    random = ["model.init_std=0.3", "model.tie_embeddings=false", "sample.temperature=0.0"]
    settings = [*tiny, *random, f"train.steps={STEPS}", "parallel.ep=2"]
    run("train", [*settings, "run.dir=run"], folder, ranks=2)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Ended:
    """The export by two ranks that share the experts."""
    return run("export", ["run.dir=run", "to=two", "parallel.ep=2"], run_dir.parent, ranks=2)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_command_says_where_it_lies_what_was_compared_and_how_to_load_it(exported: Ended) -> None:
    assert f"step {STEPS} as MixtralForCausalLM in two: 2 file(s)" in exported.stdout
    assert "hold the run's weights; logits in transformers differ by at most" in exported.stdout
    assert 'AutoModelForCausalLM.from_pretrained("two")' in exported.stdout
    assert "model.init_from=two" in exported.stdout


def test_the_folder_is_complete(run_dir: Path, exported: Ended) -> None:
    folder = run_dir.parent / "two"
    names = {path.name for path in folder.iterdir()}
    companions = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    files = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert names == companions | files | {"model.safetensors.index.json"}
    assert [path.name for path in run_dir.parent.iterdir() if "partial" in path.name] == []
    assert f"| training | {STEPS} steps" in (folder / "README.md").read_text()
    assert "nats per token" in (folder / "README.md").read_text(), "the final evaluation is on the card"


def test_transformers_generates_the_text_that_we_generate(run_dir: Path, exported: Ended) -> None:
    greedy = ["run.dir=run", f"prompt={PROMPT}", "sample.temperature=0.0", "sample.max_tokens=20"]
    ours = run("generate", greedy, run_dir.parent).stdout
    model = AutoModelForCausalLM.from_pretrained(run_dir.parent / "two")
    tokenizer = AutoTokenizer.from_pretrained(run_dir.parent / "two")
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=20)
    assert not model.generation_config.do_sample, "the run's own setting is greedy"
    theirs = tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
    assert "\n".join(theirs.splitlines()) == "\n".join(ours.splitlines())
    assert len(set(ours.removeprefix(PROMPT))) > 3, "text, not one sign again and again"


def test_the_weights_are_those_of_the_checkpoint(run_dir: Path, exported: Ended) -> None:
    found, ours = weights(run_dir.parent / "two"), tensors_of(checkpoint_path(run_dir, STEPS))
    assert torch.equal(found["model.embed_tokens.weight"], ours["model.embedding_VD"])
    assert torch.equal(found["model.norm.weight"], ours["model.norm.weight"])
    assert sum(tensor.numel() for tensor in found.values()) == sum(
        tensor.numel() for name, tensor in ours.items() if name.startswith("model.")
    )


def test_one_rank_writes_the_same_tensors(run_dir: Path, exported: Ended) -> None:
    run("export", ["run.dir=run", "to=one", "verify=false", "shard_bytes=50000"], run_dir.parent)
    one, two = weights(run_dir.parent / "one"), weights(run_dir.parent / "two")
    assert one.keys() == two.keys() and len(one) > 20
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in two)
    assert len(list((run_dir.parent / "one").glob("*.safetensors"))) > 2
    configs = [json.loads((run_dir.parent / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]


def test_a_taken_target_is_refused_and_untouched(run_dir: Path, exported: Ended) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (run_dir.parent / "two").iterdir()}
    refused = run("export", ["run.dir=run", "to=two"], run_dir.parent, status=2)
    assert "to=two: is a folder with something in it" in refused.stderr and "Traceback" not in refused.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (run_dir.parent / "two").iterdir()} == before


@pytest.mark.slow
def test_the_projects_own_layout_holds_our_names(run_dir: Path) -> None:
    arguments = ["run.dir=run", "to=own", "format=moe_train", "parallel.ep=2", "dtype=bf16"]
    told = run("export", arguments, run_dir.parent, ranks=2)
    assert "no class of transformers loads this layout" in told.stdout
    found, ours = weights(run_dir.parent / "own"), tensors_of(checkpoint_path(run_dir, STEPS))
    experts = ours["model.blocks.0.ffn.experts.gate_up_LDF2"]
    for expert in range(len(experts)):
        assert torch.equal(found[f"blocks.0.ffn.experts.gate_up_LDF2.{expert}"], experts[expert].bfloat16())
    assert json.loads((run_dir.parent / "own" / "config.json").read_text())["model"]["dim"] == 32


@pytest.mark.slow
def test_a_model_that_no_class_expresses_is_refused_or_written_in_our_layout(tiny: list[str], tmp_path: Path) -> None:
    switch = [
        "model/ffn/router=hash",
        "model.ffn.balance.aux=null",
        "model.ffn.balance.z_loss=null",
        "train.steps=1",
        "run.dir=run",
    ]
    run("train", [*tiny, *switch], tmp_path)
    refused = run("export", ["run.dir=run", "to=out", "format=huggingface"], tmp_path, status=2)
    assert "format=huggingface: mixtral cannot be this model:" in refused.stderr
    assert not (tmp_path / "out").exists()
    told = run("export", ["run.dir=run", "to=out"], tmp_path)
    assert "no public class expresses this model" in told.stdout and "mixtral: " in told.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "moe_train"
