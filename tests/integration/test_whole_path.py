"""From a text to a report through the commands, on one rank: what each prints, writes and leaves as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import Ended, checkpoint_path, curve, good_steps, records, run

STEPS = 120
KEY, TOKEN = "0123456789abcdef0123456789abcdef01234567", "hf_aVeryLongAndVerySecretToken"
RUN_FOLDER = {
    "config.yaml", "metrics.jsonl", "checkpoints", "tokenizer.json", "report", "environment.json", "samples",
}  # fmt: skip
TRAIN_KEYS = [
    "kind", "step", "loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_ms",
    "data_wait_ms", "exchange_ms", "memory_gib", "mfu",
]  # fmt: skip
LAYER_KEYS = [
    "load", "dropped_fraction", "dropped_capacity_fraction", "dropped_device_fraction", "dropped_router_fraction",
    "rerouted_fraction", "max_violation", "entropy", "dead_experts",
]  # fmt: skip
Generate = Callable[..., str]


@dataclass(frozen=True)
class Left:
    """What a life of the run left behind."""

    said: Ended
    curve: list[tuple[Any, ...]]
    evaluations: list[dict[str, Any]]
    manifest: str


@dataclass(frozen=True)
class Whole:
    """A run: its folder, its only life, and a second start after it was finished."""

    run_dir: Path
    prepared: Ended
    trained: Left
    again: Left


@pytest.fixture(scope="module")
def whole(tiny: list[str], data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    run_dir = folder / "run"
    settings = [*tiny, "run.dir=run", "run.name=whole", f"train.steps={STEPS}", "optim.lr=1e-2", "checkpoint.every=50"]
    settings += ["eval.every=60", "eval.batches=1"]

    def life() -> Left:
        said = run("train", settings, folder, variables={"WANDB_API_KEY": KEY, "HF_TOKEN": TOKEN})
        manifest = checkpoint_path(run_dir, STEPS) / "manifest.json"
        return Left(said, curve(run_dir), records(run_dir, "eval"), manifest.read_text())

    return Whole(run_dir, run("prepare", data, folder), life(), life())


@pytest.fixture(scope="module")
def generate(whole: Whole) -> Generate:
    def command(seed: int, temperature: float, remember: bool = True) -> str:
        wanted = [f"sample.seed={seed}", f"sample.temperature={temperature}", "sample.max_tokens=40"]
        wanted += [f"inference.remember={remember}"]
        said = run("generate", ["run.dir=run", "prompt=The end", *wanted], whole.run_dir.parent)
        assert said.stdout.startswith("The end")
        return said.stdout

    return command


@pytest.fixture(scope="module")
def drawn(generate: Generate) -> str:
    return generate(seed=1, temperature=1.0)


def test_preparation_is_found_by_the_training(whole: Whole) -> None:
    assert re.search(r"train .*heldout ", whole.prepared.stdout, re.DOTALL)
    assert Path(whole.prepared.stdout.split("folder: ")[1].strip()).is_dir()
    assert "preparing" not in whole.trained.said.stdout.lower()


def test_the_run_folder_holds_what_the_readme_names_and_nothing_else(whole: Whole) -> None:
    assert {path.name for path in whole.run_dir.iterdir()} == RUN_FOLDER
    assert [path.name for path in (whole.run_dir / "report").iterdir()] == ["index.html"]
    assert good_steps(whole.run_dir) == [100, STEPS]  # two are kept
    config = yaml.safe_load((whole.run_dir / "config.yaml").read_text())
    assert (config["run"]["name"], config["train"]["steps"], config["model"]["dim"]) == ("whole", STEPS, 32)
    environment = json.loads((whole.run_dir / "environment.json").read_text())
    assert "moe_train.train" in " ".join(environment["command"])
    assert environment["packages"].keys() >= {"moe_train", "torch"}
    assert re.fullmatch(r"[0-9a-f]{40}", environment["git"]["commit"])


def test_every_line_of_the_metrics_has_the_fixed_keys(whole: Whole) -> None:
    lines = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    layers = [f"moe/layer_{depth:02d}/{key}" for depth in (0, 1) for key in LAYER_KEYS]
    assert all(list(line) == [*TRAIN_KEYS, *layers] for line in train)
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in train] == [step * 8 * 32 for step in range(1, STEPS + 1)]
    for line in train:
        assert len(line["moe/layer_01/load"]) == 8 and abs(sum(line["moe/layer_01/load"]) - 1) < 1e-9
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [60, STEPS]
    assert all(line.keys() >= {"loss", "perplexity", "bits_per_byte"} for line in evals)
    assert next(line["event"] for line in lines if line["kind"] == "event") == "started"


def test_the_model_has_learnt_more_than_the_frequencies_of_the_letters(whole: Whole) -> None:
    final = whole.trained.evaluations[-1]
    assert final["bits_per_byte"] < final["unigram_bits_per_byte"] < 8


def test_the_training_ends_with_what_it_reached_and_where_it_lies(whole: Whole) -> None:
    final = whole.trained.evaluations[-1]
    sample, _, closing = whole.trained.said.stdout.partition("--- sample ---\n")[2].partition("\n--------------\n")
    assert sample.startswith("ROMEO:\n")
    held_out, run_line, report_line = closing.strip().splitlines()
    assert held_out == (
        f"held-out loss {final['loss']:.4f} nats/token, perplexity {final['perplexity']:.1f}; "
        f"{final['bits_per_byte']:.3f} bits/byte (unigram entropy of the same tokens: "
        f"{final['unigram_bits_per_byte']:.3f})"
    )
    assert run_line.split() == ["run:", str(whole.run_dir)]
    assert report_line.split() == ["report:", str(whole.run_dir / "report" / "index.html")]


def test_a_finished_run_that_is_started_again_changes_nothing(whole: Whole) -> None:
    assert whole.again.curve == whole.trained.curve
    assert whole.again.evaluations == whole.trained.evaluations
    assert whole.again.manifest == whole.trained.manifest
    held_out = [said.stdout.split("held-out loss")[1] for said in (whole.trained.said, whole.again.said)]
    assert held_out[0] == held_out[1]


def test_evaluate_repeats_the_final_evaluation(whole: Whole) -> None:
    printed = json.loads(run("evaluate", ["run.dir=run"], whole.run_dir.parent).stdout)
    final = {key: value for key, value in whole.trained.evaluations[-1].items() if key != "kind"}
    assert printed == final


def test_the_same_seed_gives_the_same_text(generate: Generate, drawn: str) -> None:
    assert generate(seed=1, temperature=1.0) == drawn


def test_greedy_text_needs_no_seed_and_differs_from_drawn_text(generate: Generate, drawn: str) -> None:
    greedy = generate(seed=1, temperature=0.0)
    assert greedy == generate(seed=2, temperature=0.0)
    assert greedy != drawn


def test_a_text_that_is_read_again_for_every_token_is_the_same(generate: Generate, drawn: str) -> None:
    assert generate(seed=1, temperature=1.0, remember=False) == drawn


def test_the_report_is_drawn_again_from_the_records(whole: Whole) -> None:
    page = whole.run_dir / "report" / "index.html"
    before = page.read_text()
    page.unlink()
    said = run("report", ["run.dir=run"], whole.run_dir.parent)
    assert Path(said.stdout.strip()).name == "index.html"
    assert len(page.read_text()) > 0.9 * len(before) > 10_000


def test_no_secret_of_the_environment_is_written_anywhere(whole: Whole) -> None:
    written = [path.read_bytes() for path in whole.run_dir.rglob("*") if path.is_file()]
    shown = [(said.stdout + said.stderr).encode() for said in (whole.trained.said, whole.again.said)]
    for secret in (KEY, TOKEN):
        assert not any(secret.encode() in content for content in written + shown)
