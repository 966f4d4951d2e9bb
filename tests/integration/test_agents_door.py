"""The command moe_train.agents: endpoints on the loopback interface, and runs of this project, from start to exit."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import ROOT, Ended, run

sys.path.insert(0, str(ROOT / "tests" / "unit" / "agents"))

from chat_server import ChatServer, dead_url, hangs, refuses, says, serving

KEY = "kq-93-not-to-be-seen"
STEPS = 30


def two_endpoints(first: str, second: str) -> list[str]:
    """A mixture of two endpoints in two layers of proposers, of which the first aggregates: 5 calls."""
    given = ["mixture=single", "mixture.layers=[[model,other],[model,other]]", "mixture.key_env=SOME_KEY", "name=talk"]
    for name, address in (("model", first), ("other", second)):
        agent = f"mixture.agents.{name}"
        given += [f"{agent}.kind=openai", f"{agent}.model={name}", f"{agent}.base_url={address}", f"{agent}.retries=1"]
        given += [f"{agent}.backoff_s=0.05", f"{agent}.timeout_s=1.5"]
    return given


def ask(folder: Path, overrides: list[str], status: int = 0) -> tuple[Ended, dict[str, Any]]:
    ended = run("agents", [*overrides, "prompt=Why?"], folder, variables={"SOME_KEY": KEY}, status=status)
    assert "Traceback" not in ended.stderr
    out = folder / "runs" / "agents" / "talk"
    for path in out.iterdir():
        assert KEY not in path.read_text() + ended.stdout + ended.stderr
    return ended, json.loads((out / "transcript.json").read_text())


def sent(chat: ChatServer) -> list[list[str]]:
    return [request.contents() for request in chat.requests]


def test_two_endpoints_answer_in_layers(tmp_path: Path) -> None:
    with (
        serving(says("One."), says("Three."), says("It is five.")) as first,
        serving(says("Two."), says("Four.")) as second,
    ):
        overrides = [*two_endpoints(first.base_url, second.base_url), "mixture.agents.other.stream=true"]
        ended, found = ask(tmp_path, overrides)
    assert ended.stdout == "It is five.\n" and ended.stderr.startswith("transcript: ")
    assert (found["calls"], found["attempts"], found["status"]) == (5, 5, "done")
    (opening,), (synthesis, request), (last, _) = sent(first)
    assert (
        opening == request == "Why?" and synthesis.endswith("1. One.\n2. Two.") and last.endswith("1. Three.\n2. Four.")
    )
    assert sent(second) == [["Why?"], [synthesis, "Why?"]]
    assert "It is five." in (tmp_path / "runs" / "agents" / "talk" / "transcript.html").read_text()


@pytest.mark.parametrize(
    "fault", ["dead", pytest.param("silent", marks=pytest.mark.slow), pytest.param("refusing", marks=pytest.mark.slow)]
)
def test_an_endpoint_that_fails_is_left_out_and_told(fault: str, tmp_path: Path) -> None:
    reply = hangs if fault == "silent" else refuses(500, f"no {KEY}")
    with serving(says("Alone.")) as first, serving(reply) as second:
        address = dead_url() if fault == "dead" else second.base_url
        ended, found = ask(tmp_path, two_endpoints(first.base_url, address))
    assert ended.stdout == "Alone.\n" and len(first.requests) == 3
    assert len(second.requests) == (0 if fault == "dead" else 4), "two attempts in each layer"
    told = [line for line in ended.stderr.splitlines() if "left out after 2 attempts" in line]
    assert [line.partition(":")[0] for line in told] == ["layer 1, other", "layer 2, other"]
    assert [line for line in found["events"] if "left out" in line] == told


def test_without_any_answer_the_command_fails(tmp_path: Path) -> None:
    ended, found = ask(tmp_path, two_endpoints(dead_url(), dead_url()), status=1)
    assert ended.stdout == "" and "layer 1: none of 2 proposers answered" in ended.stderr
    assert found["status"] == "failed" and found["calls"] == 2
    assert "No answer" in (tmp_path / "runs" / "agents" / "talk" / "transcript.html").read_text()


def test_mistakes_are_told_at_once(tmp_path: Path) -> None:
    ended = run("agents", ["mixture.aggregator=x", "mixture.key_env=SOME_KEY"], tmp_path, status=2)
    keys = [line.strip().partition(":")[0].partition("=")[0] for line in ended.stderr.splitlines()[1:]]
    assert keys == ["prompt", "mixture.aggregator", "mixture.agents.first.dir", "mixture.agents.second.dir"]
    assert not list(tmp_path.glob("*/")), "nothing is made"


@pytest.fixture(scope="module")
def duo(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs on the same text, of other seeds."""
    folder = tmp_path_factory.mktemp("duo")
    for seed, name in enumerate(("first", "second")):
        run("train", [*tiny, f"run.name={name}", f"run.seed={seed}", f"train.steps={STEPS}"], folder)
    return folder


@pytest.mark.slow
def test_two_runs_answer(duo: Path) -> None:
    """Their context is 32 bytes: what a layer is sent is cut, and that is told."""
    short = [f"mixture.agents.{name}.sample.max_tokens=12" for name in ("first", "second")]
    ended, found = ask(duo, [*short, "name=talk"])
    first, second = found["layers"][0]
    assert found["calls"] == 3 and ended.stdout.strip() == found["answer"] != ""
    assert (
        first["sent"] == [{"role": "text", "content": "Why?"}] and first["answer"]["text"] != second["answer"]["text"]
    )
    (last,) = found["layers"][1][0]["sent"]
    assert f"1. {first['answer']['text']}\n2. {second['answer']['text']}\n\nWhy?" in last["content"]
    assert "layer 2, first: the prompt has " in ended.stderr and "the model reads the last 32" in ended.stderr
    again, _ = ask(duo, [*short, "name=talk"])
    assert again.stdout == ended.stdout, "the same seeds give the same text"


@pytest.mark.slow
def test_two_runs_are_scored(duo: Path) -> None:
    """Each by itself is what evaluate says of it."""
    ended = run("agents", ["mode=perplexity", "score.fit_fraction=0", "name=score"], duo)
    figures = json.loads(ended.stdout)
    assert figures == json.loads((duo / "runs" / "agents" / "score" / "score.json").read_text())
    for name in ("first", "second"):
        alone = json.loads(run("evaluate", [f"run.dir=runs/{name}"], duo).stdout)
        for figure in ("loss", "perplexity", "bits_per_byte"):
            assert figures["agents"][name][figure] == pytest.approx(alone[figure], rel=1e-5)
    assert figures["tokens"] == alone["eval_tokens"] and figures["weights"] == {}
    mean = sum(agent["loss"] for agent in figures["agents"].values()) / 2
    assert all(mixture["loss"] < mean for mixture in figures["mixtures"].values())
    fitted = json.loads(run("agents", ["mode=perplexity", "score.batches=4"], duo).stdout)
    assert fitted["mixtures"].keys() == {"linear", "geometric", "fitted"} and sum(
        fitted["weights"].values()
    ) == pytest.approx(1)


@pytest.mark.slow
def test_runs_that_share_no_tokenizer_are_not_mixed(duo: Path, tiny: list[str]) -> None:
    bpe = ["tokenizer=bpe", "tokenizer.vocab_size=300", "run.name=other", "train.steps=2"]
    run("train", [*[given for given in tiny if given != "tokenizer=bytes"], *bpe], duo)
    ended = run("agents", ["mode=perplexity", "mixture.agents.second.dir=runs/other"], duo, status=2)
    assert "mixture.agents.second.dir: its tokenizer differs from first's" in ended.stderr


@pytest.mark.slow
def test_classifiers_vote(tmp_path: Path) -> None:
    """Each by itself is right as often as its training says. Of two the vote is the mean: every tie goes to it."""
    draw = random.Random(0)
    words = {"good": ["fine", "lovely", "great"], "bad": ["awful", "grim", "dull"]}
    others = ["the", "a", "film", "plot", "it", "was", "so", "and"]
    lines = [
        " ".join(draw.sample([*draw.choices(others, k=5), draw.choice(words[label])], 6)) + f",{label}"
        for label in words
        for _ in range(150)
    ]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    given = ["task=sentiment", "data=labelled", "data.path=texts.csv", "data.cache_dir=cache", "tokenizer=bytes",
             "model.dim=32", "model.heads=2", "model.attention.kv_heads=2", "model.layers=1", "data.seq_len=32",
             "data.heldout_fraction=0.2", "train.global_batch=16", "optim.warmup_steps=5",
             "log.wandb.mode=disabled", "eval.every=0", "checkpoint.every=0"]  # fmt: skip
    alone = {}
    for seed, name in enumerate(("first", "second")):
        run("train", [*given, f"run.name={name}", f"run.seed={seed}", f"train.steps={10 + 10 * seed}"], tmp_path)
        alone[name] = json.loads(run("evaluate", [f"run.dir=runs/{name}"], tmp_path).stdout)["accuracy"]
    found = json.loads(run("agents", ["mode=vote", "name=vote"], tmp_path).stdout)
    assert len(set(alone.values())) == 2, "else their order would not show"
    assert found["agents"] == pytest.approx(alone) and found["vote"] == found["mean"] and found["texts"] >= 50
    assert json.loads((tmp_path / "runs" / "agents" / "vote" / "score.json").read_text()) == found
    ended = run("agents", ["prompt=hi"], tmp_path, status=2)
    assert "mixture.agents.first.dir: mode=answer needs a language model" in ended.stderr
