"""Measures what experts on disk cost and save: peak memory and tokens per second for several sizes of the cache.

Usage: python scripts/offload_cost.py [--experts 32] [--dim 256] [--hidden 512] [--layers 4] [--sizes 1 2 4]
    [--tokens 40] [--repeats 5] [--precision fp32]

An untrained model continues a short text, greedily, with keys and values remembered. Each way (everything in memory,
caches of each size, a cache with room for all) has a process of its own; they take turns, so that a disturbance of the
machine hits all of them, and ratios are medians over the rounds of the ratio within a round. Memory is anonymous
(RssAnon of /proc): heap and buffers, without the system's cache of files; its peak is looked for every few
milliseconds. The operating system has the files in its cache: a disk that must be read is slower.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

PROMPT = list(b"The experts that were used most ")
LOOK_S = 0.002
"""Between two looks at the memory of the process, in seconds."""
MIB = 2**20


def anonymous_bytes() -> int:
    """Return the resident memory of this process that is of no file."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux says how much memory a process has"
    return int(found[1]) * 1024


class Watch:
    """The largest anonymous memory while the context lasts."""

    def __enter__(self) -> Watch:
        """Begin to look."""
        self.peak_bytes, self._ends = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ends.wait(LOOK_S):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        """Look for the last time."""
        self._ends.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def save_run(folder: Path, keys: list[str]) -> None:
    """Write the folder of an untrained run."""
    from moe_train.checkpoint.manager import CheckpointManager
    from moe_train.checkpoint.reader import CHECKPOINTS
    from moe_train.checkpoint.state import CheckpointState
    from moe_train.config.compose import compose_config
    from moe_train.config.schema import TrainConfig
    from moe_train.data.tokenizer import Tokenizer
    from moe_train.dist.mesh import Layout
    from moe_train.dist.world import world_from_environment
    from moe_train.models.initialise import initialise
    from moe_train.models.transformer import build_model
    from moe_train.moe.exchange import LocalExchange
    from moe_train.parallel.state import model_parts
    from moe_train.training.setup import write_config

    config = compose_config("train", TrainConfig, lambda config: [], keys)
    tokenizer, device = Tokenizer.of_bytes(), torch.device("cpu")
    boundary = config.tokenizer.model_copy(update={"boundary_token": tokenizer.boundary_token})
    exchange = LocalExchange(config.model.ffn.num_experts)
    model = build_model(config.model, tokenizer.vocab_size, exchange, config.train.precision, device)
    initialise(model, 0)
    write_config(folder / "config.yaml", config.model_copy(update={"tokenizer": boundary}))
    tokenizer.save(folder / "tokenizer.json")
    with world_from_environment(300.0) as world:
        manager = CheckpointManager(folder / CHECKPOINTS, world, Layout(1, 1), keep=1)
        manager.save(1, CheckpointState(model_parts(model), {"step": 1}, None))


def way(folder: Path, cached: int | None, num_tokens: int, turns: Connection) -> None:
    """Load the model one way and, at each turn, continue the text and tell how long that took."""
    from moe_train.config.inference import InferenceConfig, OffloadConfig
    from moe_train.config.schema import LayoutConfig, SampleConfig
    from moe_train.dist.world import world_from_environment
    from moe_train.inference.load import load_trained
    from moe_train.inference.sampler import generate

    torch.set_num_threads(1)
    sample = SampleConfig(temperature=0.0, max_tokens=num_tokens)
    with world_from_environment(300.0) as world:
        base_bytes = anonymous_bytes()
        inference = InferenceConfig(offload=None if cached is None else OffloadConfig(cached=cached))
        with Watch() as watch:
            trained = load_trained(folder, "latest", LayoutConfig(), world, inference)
            while turns.recv():
                start_s = time.perf_counter()
                text = generate(trained.model, PROMPT, sample, -1, 4096, True)
                traffic = None if trained.offloaded is None else trained.offloaded.traffic()
                turns.send((time.perf_counter() - start_s, text, traffic and (traffic.hits, traffic.misses)))
        turns.send(watch.peak_bytes - base_bytes)


def measure(folder: Path, ways: dict[str, int | None], num_tokens: int, repeats: int) -> list[dict[str, object]]:
    """Return a row for each way: times of all rounds in seconds, peak bytes beside the interpreter's, hit rate."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, cached in ways.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=way, args=(folder, cached, num_tokens, theirs), daemon=True))
        processes[-1].start()
        # Does not count: the model is loaded, and the folder of experts written by one process alone.
        pipes[name].send(True)
        pipes[name].recv()
    rows: dict[str, list[tuple[float, list[int], tuple[int, int] | None]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            rows[name].append(pipe.recv())
    texts = {tuple(answer[1]) for answers in rows.values() for answer in answers}
    assert len(texts) == 1, "all ways write the same text"
    result: list[dict[str, object]] = []
    for name, pipe in pipes.items():
        pipe.send(False)
        traffic = rows[name][-1][2]
        rate = None if traffic is None else traffic[0] / max(1, sum(traffic))
        result.append({"way": name, "s": [a[0] for a in rows[name]], "peak": pipe.recv(), "hit_rate": rate})
    for process in processes:
        process.join()
    return result


def table(rows: list[dict[str, object]], num_tokens: int) -> str:
    """Return a Markdown table; the first row is what the others are compared with."""
    lines = [
        "| experts in memory per layer | peak, MiB | relative | tokens/s | relative | hit rate |",
        "|---" * 6 + "|",
    ]
    first_s, first_bytes = np.array(rows[0]["s"]), rows[0]["peak"]
    assert isinstance(first_bytes, int), "a peak is a number of bytes"
    for row in rows:
        seconds, peak, rate = np.array(row["s"]), row["peak"], row["hit_rate"]
        assert isinstance(peak, int), "a peak is a number of bytes"
        speed, relative = num_tokens / np.median(seconds), np.median(first_s / seconds)
        hits = "-" if rate is None else f"{rate:.3f}"
        cells = [f"{peak / MIB:.0f}", f"{peak / first_bytes:.2f}", f"{speed:.1f}", f"{relative:.2f}", hits]
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a Markdown table, and every time as JSON."""
    parser = argparse.ArgumentParser(description="What experts on disk cost and save.")
    for name, default in (
        ("experts", 32),
        ("dim", 256),
        ("hidden", 512),
        ("layers", 4),
        ("tokens", 40),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    given = parser.parse_args()
    keys = [f"model.dim={given.dim}", f"model.layers={given.layers}", f"model.ffn.num_experts={given.experts}",
            f"model.ffn.expert_dim={given.hidden}", "model.init_std=0.1", "tokenizer=bytes", "data.seq_len=4096",
            f"train.precision={given.precision}"]  # fmt: skip
    ways: dict[str, int | None] = {"everything in memory": None}
    ways |= {f"{size} cached": size for size in given.sizes} | {"all cached": given.experts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_run(folder, keys)
        rows = measure(folder, ways, given.tokens, given.repeats)
    print(f"{given.experts} experts in {given.layers} layers, {given.precision}, one thread, {given.tokens} tokens\n")
    print(table(rows, given.tokens))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
