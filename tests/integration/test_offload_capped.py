"""A model whose experts are four times the memory that its process may have writes the text of the one in memory."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from offload_samples import config_of, save_run

from launch import Ended, end_of, running
from moe_train.dist.world import World, joined
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts maps on Linux only"),
]
TIMES = 4
BUDGET_BYTES = 80 * 2**20
"""What the process may have beside what the same command needs for a model of a few kilobytes."""
MOST_ON_DISK_BYTES = 3 * 10**9
DIM, HIDDEN, LAYERS = 256, 512, 3
EXPERT_BYTES = 3 * DIM * HIDDEN * 4
CAPPED = Path(__file__).parents[1] / "offload_capped.py"
SAYS = ["prompt=Once", "sample.max_tokens=14", "sample.temperature=1.0"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    alone = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), alone):
        yield alone


def told(run_dir: Path, limit_bytes: int, *keys: str, status: int | None = 0) -> Ended:
    """What the command for generation leaves behind under a cap."""
    words = [sys.executable, str(CAPPED), str(limit_bytes), "generate", f"run.dir={run_dir}", *SAYS, *keys]
    # Settings that keep freed memory are for speed.
    with running(words, run_dir, {"MOE_TRAIN_SETTINGS": "0"}) as command:
        return end_of(command, 180.0, status)


def data_bytes(ended: Ended) -> int:
    """What the process had at its end of what the cap counts."""
    found = re.search(r"VmData (\d+)", ended.stderr)
    assert found, ended.stderr
    return int(found[1])


def halved(model: Transformer) -> None:
    """First values, kept in bf16: a checkpoint of half the size for a run in fp32."""
    initialise(model, 0)
    model.to(torch.bfloat16)


def test_experts_of_four_times_the_cap(tmp_path: Path, world: World) -> None:
    tiny, large = tmp_path / "tiny", tmp_path / "large"
    save_run(tiny, world)
    limit_bytes = data_bytes(told(tiny, 0, "inference.offload.cached=2")) + BUDGET_BYTES
    num_experts = -(-TIMES * limit_bytes // (EXPERT_BYTES * LAYERS))
    if 1.5 * num_experts * LAYERS * EXPERT_BYTES > MOST_ON_DISK_BYTES:
        pytest.skip(f"Python and torch alone take {(limit_bytes - BUDGET_BYTES) / 2**20:.0f} MiB here")
    keys = [f"model.dim={DIM}", f"model.layers={LAYERS}", f"model.ffn.expert_dim={HIDDEN}", "model.init_std=0.1",
            f"model.ffn.num_experts={num_experts}"]  # fmt: skip
    assert config_of(*keys).train.precision == "fp32"
    save_run(large, world, *keys, fill=halved)

    truth = told(large, 0)
    control = told(large, limit_bytes, status=None)
    assert control.status not in (0, 2) and "memory" in control.stderr.lower(), control.stderr[-2000:]

    capped = told(large, limit_bytes, "inference.offload.cached=2")  # writes the folder under the cap, too
    assert capped.stdout == truth.stdout and len(truth.stdout) > len("Once\n")
    on_disk = sum(path.stat().st_size for path in (large / "experts").rglob("*.safetensors"))
    assert on_disk >= TIMES * limit_bytes
    again = told(large, limit_bytes, "inference.offload.cached=3", "inference.remember=false")
    assert again.stdout == truth.stdout
    hits, misses = map(int, re.findall(r"(\d+) hits, (\d+) misses", again.stderr)[0])
    assert hits and misses
    shutil.rmtree(large)
