"""Rules across fields. Each returns its problems; all are asked, so that a user sees every mistake at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from moe_train.config.routing_rules import routing_problems
from moe_train.config.schema import DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from moe_train.errors import Problem


def data_problems(data: DataConfig, tokenizer: TokenizerConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of data and tokenizer."""
    if data.source in ("text", "huggingface", "tokens") and data.path is None:
        yield Problem("data.path", None, f"is required for data.source={data.source}", "set data.path=...")
    if data.source == "mix" and not data.parts:
        yield Problem(
            "data.parts", "{}", "a mix needs at least one part", "choose data=mix or set data.parts.LABEL.source"
        )
    for label, part in data.parts.items():
        if part.source in ("mix", "tokens"):
            yield Problem(f"data.parts.{label}.source", part.source, "a mix holds texts only", "name a text source")
        if part.source in ("text", "huggingface") and part.path is None:
            yield Problem(f"data.parts.{label}.path", None, f"is required for source={part.source}", "set it")
    if tokenizer.kind == "file" and tokenizer.path is None:
        yield Problem("tokenizer.path", None, "is required for tokenizer.kind=file", "set it to a tokenizer.json")


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of model."""
    if model.dim % model.heads:
        yield Problem("model.heads", model.heads, f"must divide model.dim={model.dim}", "change one of them")
    elif (model.dim // model.heads) % 2:
        width = model.dim // model.heads
        yield Problem(
            "model.heads",
            model.heads,
            f"rotary positions need an even head width, not {width}",
            "change model.dim or model.heads",
        )
    kv_heads = model.attention.kv_heads
    if kv_heads is not None and model.heads % kv_heads:
        yield Problem(
            "model.attention.kv_heads", kv_heads, f"must divide model.heads={model.heads}", "change one of them"
        )
    ffn = model.ffn
    if ffn.num_experts == 0:
        return
    if ffn.every > model.layers:
        yield Problem(
            "model.ffn.every", ffn.every, f"leaves no MoE layer among model.layers={model.layers}", "lower it"
        )
    yield from routing_problems(ffn)


def batch_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong between batch sizes and the number of ranks."""
    batch, micro = config.train.global_batch, config.train.micro_batch
    if micro is None and batch % world_size:
        yield Problem(
            "train.global_batch",
            batch,
            f"must be a multiple of the {world_size} ranks",
            "change it or the number of ranks",
        )
    if micro is not None and batch % (micro * world_size):
        yield Problem(
            "train.micro_batch",
            micro,
            f"micro_batch x ranks = {micro} x {world_size} must divide train.global_batch={batch}",
            "change one of them",
        )


def layout_problems(ep: int, num_experts: int, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong between EP size, experts and ranks."""
    if world_size % ep:
        yield Problem(
            "parallel.ep",
            ep,
            f"must divide the number of ranks, {world_size}",
            f"start a multiple of {ep} ranks (torchrun --nproc-per-node) or lower parallel.ep",
        )
    if ep > 1 and num_experts == 0:
        yield Problem(
            "parallel.ep", ep, "a dense model has no experts to shard", "set parallel.ep=1 or choose a MoE model"
        )
    elif num_experts % ep:
        yield Problem("parallel.ep", ep, f"must divide model.ffn.num_experts={num_experts}", "change one of them")


def schedule_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what is wrong between lengths."""
    if config.optim.warmup_steps > config.train.steps:
        yield Problem(
            "optim.warmup_steps",
            config.optim.warmup_steps,
            f"must not exceed train.steps={config.train.steps}",
            "lower it or train longer",
        )


def run_problems(name: str) -> Iterator[Problem]:
    """Yield what is wrong with the name of a run: it becomes a folder and must stay inside its parent."""
    if not name or len(name) > 100 or name in (".", "..") or any(c in "/\\\0" or not c.isprintable() for c in name):
        yield Problem(
            "run.name", name[:40], "must be 1 to 100 printable characters without slashes", "choose a plain name"
        )


def train_problems(config: TrainConfig) -> list[Problem]:
    """Return every broken rule of a training run on the ranks that the launcher started."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    checks: list[Callable[[], Iterator[Problem]]] = [
        lambda: run_problems(config.run.name),
        lambda: data_problems(config.data, config.tokenizer),
        lambda: model_problems(config.model),
        lambda: batch_problems(config, world_size),
        lambda: layout_problems(config.parallel.ep, config.model.ffn.num_experts, world_size),
        lambda: schedule_problems(config),
    ]
    return [problem for check in checks for problem in check()]
