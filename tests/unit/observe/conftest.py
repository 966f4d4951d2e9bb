"""A made-up run with known figures, as the files of a run folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def causes(prefix: str, dropped: float) -> dict[str, float]:
    """Drops for full experts and by the router, none for full devices, and as many rerouted as dropped."""
    return {
        f"{prefix}/dropped_capacity_fraction": 0.75 * dropped,
        f"{prefix}/dropped_device_fraction": 0.0,
        f"{prefix}/dropped_router_fraction": 0.25 * dropped,
        f"{prefix}/rerouted_fraction": dropped,
    }


def step_record(step: int, random: np.random.Generator) -> dict[str, Any]:
    """A train record with a falling loss, and nothing about experts."""
    return {
        "kind": "train",
        "step": step,
        "loss": 3.0 + 5.3 * math.exp(-step / 80) + float(random.normal(0, 0.05)),
        "aux_loss": 1.05,
        "z_loss": 0.4,
        "grad_norm": 0.8,
        "lr": 3e-4,
        "tokens": step * 8192,
        "tokens_per_s": 41_200.0 + float(random.normal(0, 900)),
        "step_ms": 200.0 + float(random.normal(0, 5)),
        "data_wait_ms": 4.0,
        "exchange_ms": 31.0,
        "memory_gib": 1.9,
        "mfu": None,
    }


def attention_figures(step: int, layers: int, experts: int = 6) -> dict[str, Any]:
    """What records tell of the experts in attention: outputs evener than values, deeper layers evener than others."""
    found: dict[str, Any] = {}
    for layer in range(layers):
        for side, most in (("values", 0.4), ("outputs", 0.3)):
            prefix = f"moe/layer_{layer:02d}_{side}"
            rest = (1 - most / (layer + 1)) / (experts - 1)
            found[f"{prefix}/load"] = [most / (layer + 1), *[rest] * (experts - 1)]
            found |= {
                f"{prefix}/dropped_fraction": 0.0,
                f"{prefix}/dead_experts": 0,
                f"{prefix}/entropy": most + step / 1000,
            }
    return found


def depth_figures(step: int, layers: int) -> dict[str, Any]:
    """What records tell of every other block that an eighth of the tokens pass: the causal choice gets better."""
    found: dict[str, Any] = {"depth_loss": 0.3}
    for layer in range(1, layers, 2):
        prefix = f"moe/layer_{layer:02d}_depth"
        wrong = 0.4 * math.exp(-step / 100) + 0.01 * layer
        found[f"{prefix}/chosen_share"] = 0.125
        found |= {f"{prefix}/causal_share": 0.125 + wrong / 2, f"{prefix}/causal_accuracy": 1 - wrong}
    return found


def train_record(
    step: int,
    layers: int = 4,
    experts: int = 8,
    drop: float = 0.0,
    bias: bool = False,
    ahead: bool = False,
    attention: bool = False,
    deep: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A train record of a routed model; the experts of deeper layers start out more uneven and even out.

    With ``experts=0`` its feed-forward layers are dense; its attention may have experts, and tokens may pass blocks by.
    """
    random = np.random.default_rng([seed, step])
    record = step_record(step, random)
    record |= (attention_figures(step, layers) if attention else {}) | (depth_figures(step, layers) if deep else {})
    if ahead:
        record["mtp_loss"] = record["loss"] + 0.4
    for layer in range(layers if experts else 0):
        skew = np.random.default_rng([seed, layer]).normal(0, 0.4 + layer / layers, experts)
        weights = np.exp(skew * math.exp(-step / 120) + random.normal(0, 0.08, experts))
        load = weights / weights.sum()
        if layer == layers - 1 and step < 100:
            load[0] = 0.0
        prefix = f"moe/layer_{layer:02d}"
        record[f"{prefix}/load"] = load.tolist()
        record[f"{prefix}/dropped_fraction"] = drop * math.exp(-step / 100) * (1 + layer / layers)
        record[f"{prefix}/max_violation"] = float(load.max() * experts - 1)
        record[f"{prefix}/entropy"] = math.log(experts) * (1 - 0.5 * (1 - math.exp(-step / 150)) * (layer + 1) / layers)
        record[f"{prefix}/dead_experts"] = int((load == 0).sum())
        if drop:
            record |= causes(prefix, record[f"{prefix}/dropped_fraction"])
        if bias:
            record[f"{prefix}/bias_range"] = 0.2 * (1 - math.exp(-step / 100)) * (1 + layer / layers)
    return record


def graph_record(
    step: int, layers: int = 4, experts: int = 4, depth: int = 2, signed: bool = False, seed: int = 0
) -> dict[str, Any]:
    """A train record of graph-coupled experts that become alike; ``depth`` graph layers, 0: without messages.

    With ``signed`` similarities, half of the messages are negative.
    """
    record = step_record(step, np.random.default_rng([seed, step])) | {"aux_loss": None, "orthogonality_loss": 0.2}
    grown = 1 - math.exp(-step / 150)
    for layer in range(layers):
        random = np.random.default_rng([seed, layer])
        alike = 0.9 * grown * (layer + 1) / layers * (experts > 1)
        prefix = f"moe/layer_{layer:02d}"
        record[f"{prefix}/similarity"] = alike
        record[f"{prefix}/cosines"] = (np.eye(experts) * (1 - alike) + alike).tolist()
        record[f"{prefix}/effective_rank"] = 1 + (experts - 1) * (1 - alike)
        logits = random.normal(0, 1, (depth, experts, experts)) * (1 + grown)
        weights = (1 - np.eye(experts)) / (1 + np.exp(-logits))
        matches = random.uniform(-1 if signed else 0, 1, weights.shape)
        record[f"{prefix}/message_strength"] = (weights * matches).tolist()
        record[f"{prefix}/message_norm"] = (weights.mean(axis=(1, 2)) * (1 + grown)).tolist()
        if depth:
            record[f"{prefix}/adjacency"] = weights.tolist()
            record[f"{prefix}/adjacency_entropy"] = 0.9 * math.log(max(1, experts - 1)) * (1 - 0.2 * grown)
    return record


def write_run(run_dir: Path, steps: int = 400, every: int = 10, coupled: bool = False, **shape: Any) -> Path:
    """Write a run folder; ``shape`` goes to train_record, or to graph_record for coupled experts."""
    records: list[dict[str, Any]] = [
        {"kind": "event", "step": 0, "event": "started", "parameters": 11_400_000, "active_parameters": 4_100_000}
    ]
    for step in range(every, steps + 1, every):
        records.append(graph_record(step, **shape) if coupled else train_record(step, **shape))
        if step % (10 * every) == 0:
            loss = 3.1 + 5.2 * math.exp(-step / 80)
            heldout = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 1.6}
            if shape.get("deep"):
                heldout |= {"loss_looking_ahead": loss - 0.5, "bits_per_byte_looking_ahead": (loss - 0.5) / 1.6}
            records.append({"kind": "eval", "step": step, **heldout, "unigram_bits_per_byte": 4.1})
            records.append({"kind": "event", "step": step, "event": "saved", "message": f"step_{step:08d}"})
    environment = {
        "started_utc": "2030-01-01T00:00:00+00:00",
        "command": ["python", "-u", "-m", "moe_train.train", "run.name=made_up"],
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "variables": {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    }
    (run_dir / "samples").mkdir(parents=True)
    (run_dir / "samples" / "step_00000400.txt").write_text("ROMEO:\nWhat light <through> yonder & window breaks?")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "config.yaml").write_text(f"run:\n  name: made_up\ntrain:\n  steps: {steps}\n")
    (run_dir / "environment.json").write_text(json.dumps(environment))
    return run_dir


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder and returns its path."""
    return lambda **options: write_run(tmp_path / "run", **options)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything in it, to be read only."""
    return write_run(tmp_path_factory.mktemp("whole") / "run", drop=0.05, bias=True)


@pytest.fixture(scope="session")
def whole_graph_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run with graph-coupled experts."""
    return write_run(tmp_path_factory.mktemp("whole_graph") / "run", coupled=True)


@pytest.fixture(scope="session")
def whole_parts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run with experts in attention and feed-forward layers, and blocks that some tokens pass."""
    return write_run(tmp_path_factory.mktemp("whole_parts") / "run", drop=0.05, bias=True, attention=True, deep=True)


@pytest.fixture
def parts_record() -> dict[str, Any]:
    """A train record of one routed layer, of attention with experts around it, and of two choices of tokens."""
    return {
        "kind": "train",
        "step": 120,
        "loss": 3.0,
        "depth_loss": 0.25,
        "moe/layer_03/load": [0.5, 0.5],
        "moe/layer_03/dead_experts": 0,
        "moe/layer_03/dropped_fraction": 0.5,
        "moe/layer_03/entropy": 0.5,
        "moe/layer_03_values/load": [1.0, 0.0, 0.0, 0.0],
        "moe/layer_03_values/dead_experts": 3,
        "moe/layer_03_values/dropped_fraction": 0.0,
        "moe/layer_03_values/entropy": 1.0,
        "moe/layer_03_outputs/load": [0.5, 0.5, 0.0, 0.0],
        "moe/layer_03_outputs/dead_experts": 2,
        "moe/layer_03_outputs/dropped_fraction": 0.0,
        "moe/layer_03_outputs/entropy": 0.5,
        "moe/layer_01_depth/chosen_share": 0.125,
        "moe/layer_01_depth/causal_share": 0.25,
        "moe/layer_01_depth/causal_accuracy": 0.75,
        "moe/layer_03_depth/chosen_share": 0.125,
        "moe/layer_03_depth/causal_share": 0.0,
        "moe/layer_03_depth/causal_accuracy": 0.875,
    }


@pytest.fixture
def coupled_record() -> dict[str, Any]:
    """A train record of two layers of graph-coupled experts, with round figures."""
    return {
        "kind": "train",
        "step": 120,
        "loss": 3.0,
        "orthogonality_loss": 0.125,
        "moe/layer_01/similarity": 0.25,
        "moe/layer_01/cosines": [[1.0, 0.25], [0.25, 1.0]],
        "moe/layer_01/effective_rank": 3.0,
        "moe/layer_01/message_strength": [[[0.0, 0.5], [0.25, 0.0]]] * 2,
        "moe/layer_01/message_norm": [0.2, 0.4],
        "moe/layer_01/adjacency": [[[0.0, 1.0], [0.5, 0.0]]] * 2,
        "moe/layer_01/adjacency_entropy": 0.5,
        "moe/layer_03/similarity": 0.5,
        "moe/layer_03/effective_rank": 2.0,
        "moe/layer_03/message_norm": [0.9, None],
        "moe/layer_03/adjacency_entropy": 1.5,
    }
