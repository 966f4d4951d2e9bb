"""Classifiers through the commands: both models, one and two ranks, going on, one text, and what is refused."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch import Ended, assert_same_tensors, checkpoint_path, records, run

pytestmark = pytest.mark.slow
STEPS = 24
WORDS = {
    "bad": ["awful", "dull", "poor", "sad", "grim", "cold", "boring", "bleak"],
    "good": ["fine", "lovely", "great", "superb", "happy", "warm", "bright", "joyful"],
    "so so": ["table", "paper", "street", "window", "number", "train", "river", "bottle"],
}
FILLERS = ["the", "film", "a", "story", "this", "actor", "and", "plot", "some", "scene", "with"]
ENCODER = ["model.dim=16", "model.heads=2", "model.attention.kv_heads=2", "model.ffn.expert_dim=16"]
SMALL = ["model=moe_classifier", "optim.lr=2e-2"]
MODELS = {
    "encoder": ENCODER,
    "small": SMALL,
    "both": [*ENCODER, "model.classifier.kind=experts"],
    "bayes": [*SMALL, "+model.classifier.naive_bayes.rows=4096", "+model.classifier.lexicon.path=words.tsv"],
}


def write_lexicon(folder: Path) -> Path:
    """A file of the words that say something, rated."""
    ratings = {"bad": -2.0, "good": 1.5, "so so": 0.0}
    file = folder / "words.tsv"
    file.write_text("".join(f"{word}\t{ratings[name]}\n" for name, words in WORDS.items() for word in words))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of 400 made-up texts of three classes, whose own words give them away."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("texts")
    with (folder / "texts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for number in range(400):
            name = draw.choice(sorted(WORDS))
            words = [draw.choice(WORDS[name] if draw.random() < 0.5 else FILLERS) for _ in range(draw.randint(2, 9))]
            table.writerow([f"{' '.join([*words, draw.choice(WORDS[name])])} {number}", name])
    source = ["data=labelled", f"data.path={folder / 'texts.csv'}", f"data.cache_dir={folder / 'cache'}"]
    return ["task=sentiment", *source, "data.seq_len=32", "tokenizer.vocab_size=320"]


@pytest.fixture(scope="module")
def settings(texts: list[str]) -> list[str]:
    """The settings of a training whose steps take a few hundredths of a second."""
    short = ["train.global_batch=16", f"train.steps={STEPS}", "optim.warmup_steps=1", "optim.lr=1e-2", "log.every=1"]
    quiet = ["log.wandb.mode=disabled", "eval.every=12", "eval.batches=1", "checkpoint.every=0"]
    return [*texts, *short, *quiet]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    run_dir: Path
    said: Ended

    @property
    def final(self) -> dict[str, Any]:
        return records(self.run_dir, "eval")[-1]


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    lexicon = write_lexicon(folder)
    said = run("train", [*settings, *MODELS[request.param], "run.dir=run"], folder)
    lexicon.unlink()  # whatever comes after a training does without
    return Trained(folder / "run", said)


def test_a_run_learns_and_says_so(trained: Trained) -> None:
    final = trained.final
    assert final["accuracy"] > final["majority"] + 0.15, "words give the class away"
    assert final["eval_texts"] == sum(map(sum, final["confusion"])) and final["classes"] == ["bad", "good", "so so"]
    assert f"held-out accuracy {final['accuracy']:.4f}" in trained.said.stdout
    assert "--- sample ---" not in trained.said.stdout, "it writes no texts"
    page = (trained.run_dir / "report" / "index.html").read_text()
    for title in ("Held-out accuracy", "Confusion of classes", "Experts by class", "Utilisation of the experts"):
        assert title in page
    assert "Could not be drawn" not in page and "No eval record" not in page


def test_two_ranks_with_sharded_experts_learn_the_same(trained: Trained, settings: list[str], tmp_path: Path) -> None:
    overrides = next(words for name, words in MODELS.items() if trained.run_dir.parent.name.startswith(name))
    write_lexicon(tmp_path)
    run("train", [*settings, *overrides, "run.dir=run", "parallel.ep=2"], tmp_path, ranks=2)
    alone, sharded = (records(folder, "train") for folder in (trained.run_dir, tmp_path / "run"))
    assert [r["loss"] for r in sharded[:6]] == pytest.approx([r["loss"] for r in alone[:6]], rel=1e-5)
    keys = [key for key in alone[0] if key.endswith("by_class")]
    assert keys and all(alone[0][key] == sharded[0][key] for key in keys)


def test_evaluation_repeats_the_final_one_on_any_layout(trained: Trained) -> None:
    whole = json.loads(run("evaluate", ["run.dir=run"], trained.run_dir.parent).stdout)
    assert whole["accuracy"] == trained.final["accuracy"] and whole["confusion"] == trained.final["confusion"]
    shared = run("evaluate", ["run.dir=run", "parallel.ep=2"], trained.run_dir.parent, ranks=2).stdout
    assert json.loads(shared)["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_one_text_is_classified_and_its_experts_are_told(trained: Trained) -> None:
    words = ["run.dir=run", "text=a lovely, superb film; I don't mind"]
    told = json.loads(run("evaluate", words, trained.run_dir.parent).stdout)
    assert told["class"] == max(told["probabilities"], key=told["probabilities"].get)
    assert told["text"] == "a lovely, superb film; I don't mind" and told["experts"]
    for layer in told["experts"].values():
        chosen = [use for name, use in layer.items() if name.startswith("expert ")]
        assert sum(use["first_choice"] for use in chosen) == pytest.approx(1.0, abs=1e-3)
    again = run("evaluate", [*words, "parallel.ep=2"], trained.run_dir.parent, ranks=2).stdout
    assert json.loads(again)["probabilities"] == pytest.approx(told["probabilities"], abs=2e-4)


@pytest.mark.parametrize(
    ("door", "words", "problem"),
    [
        ("generate", ["prompt=hello"], "is a run of task=sentiment"),
        ("export", ["to=out"], "is a run of task=sentiment"),
        ("evaluate", ["text= "], "has no tokens"),
        ("evaluate", ["inference.offload.folder=x", "text=a"], "inference.offload"),
    ],
)
def test_what_a_classifier_cannot_do_is_refused(trained: Trained, door: str, words: list[str], problem: str) -> None:
    ended = run(door, ["run.dir=run", *words], trained.run_dir.parent, status=2)
    assert problem in ended.stderr and "Traceback" not in ended.stderr


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(settings: list[str], tmp_path: Path) -> None:
    words = [*settings, *ENCODER, "checkpoint.every=10", "checkpoint.keep=9"]
    run("train", [*words, "run.dir=whole"], tmp_path)
    run("train", [*words, "run.dir=parted"], tmp_path)
    for step in (20, STEPS):
        kept = checkpoint_path(tmp_path / "parted", step)
        kept.rename(tmp_path / f"aside_{step}")
    run("train", [*words, "run.dir=parted"], tmp_path)
    assert_same_tensors(checkpoint_path(tmp_path / "parted", STEPS), checkpoint_path(tmp_path / "whole", STEPS))


def test_rated_words_stay_with_the_run(settings: list[str], tmp_path: Path) -> None:
    words = [*settings, *SMALL, "+model.classifier.lexicon.path=words.tsv"]
    refused = run("train", [*words, "train.steps=2", "run.dir=run"], tmp_path, status=2)
    assert "model.classifier.lexicon.path=words.tsv: cannot be read" in refused.stderr
    assert "Traceback" not in refused.stderr
    lexicon = write_lexicon(tmp_path)
    begun = run("train", [*words, "train.steps=2", "run.dir=run"], tmp_path)
    assert "lexicon words.tsv: 24 words, " in begun.stderr
    lexicon.unlink()
    gone_on = run("train", [*words, "train.steps=4", "run.dir=run"], tmp_path)
    assert "lexicon" not in gone_on.stderr and records(tmp_path / "run", "train")[-1]["step"] == 4


def test_another_split_is_another_run(trained: Trained, settings: list[str]) -> None:
    words = [*settings, *ENCODER, "run.dir=run", "data.split_seed=1"]
    assert "data fingerprint" in run("train", words, trained.run_dir.parent, status=2).stderr


def test_runs_begin_from_runs(settings: list[str], tmp_path: Path) -> None:
    """A language model's trunk under a classifier; a head only for the same classes; never another tokenizer."""
    source = next(word for word in settings if word.startswith("data.path="))
    words = Path(source.partition("=")[2]).read_text()
    (tmp_path / "words.txt").write_text((words * 4).replace("\n", "\n\n"))
    trunk = ["model=sparse_tiny", "model.layers=2", *ENCODER, "model.ffn.num_experts=4", "model.ffn.router.scale=1.0"]
    language = ["data=text", f"data.path={tmp_path / 'words.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]
    short = ["train.steps=2", "train.global_batch=16", "data.seq_len=32", "optim.warmup_steps=1", "sample.max_tokens=2"]
    quiet = ["log.wandb.mode=disabled", "checkpoint.every=0", "eval.every=0"]
    run("train", [*language, *trunk, *short, *quiet, "tokenizer.vocab_size=320", "run.dir=lm"], tmp_path)

    same_trunk = ["model.layers=2", "model.ffn.router.kind=topk", "model.classifier.token_norm=true",
                  "model.classifier.ngrams=null"]  # fmt: skip
    begin = [*settings, *ENCODER, *same_trunk, "train.steps=1", "model.init_from=lm"]
    same = ["tokenizer.kind=file", "tokenizer.path=lm/tokenizer.json"]
    ended = run("train", [*begin, "tokenizer=bytes", "run.dir=other"], tmp_path, status=2)
    assert "tokenizer.kind=file tokenizer.path=lm/tokenizer.json" in ended.stderr
    begun = run("train", [*begin, *same, "run.dir=classifier"], tmp_path)
    assert "head.bias, head.weight begin with random values" in begun.stderr
    wide = run("train", [*begin, *same, "model.ffn.expert_dim=24", "run.dir=wide"], tmp_path, status=2)
    assert wide.stderr.count("has shape") >= 2, "every tensor is named"

    again = [*settings, *ENCODER, *same_trunk, *same, "train.steps=1", "model.init_from=classifier"]
    taken = run("train", [*again, "run.dir=again", "parallel.ep=2"], tmp_path, ranks=2)
    assert "begin with random values" not in taken.stderr and "began from step 1" in taken.stderr
    swapped = run("train", [*again, "task.classes=[good,bad,so so]", "run.dir=swapped"], tmp_path)
    assert "head.bias, head.weight begin with random values" in swapped.stderr
    trunk_again = run(
        "train", [*language, *trunk, *short, *quiet, *same, "model.init_from=lm", "run.dir=lm2"], tmp_path
    )
    assert "begin with random values" not in trunk_again.stderr
