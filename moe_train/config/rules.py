"""Rules across fields. Each returns its problems; all are asked, so that a user sees every mistake at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from moe_train.config.attention_rules import attention_problems, has_head_experts, head_layout_problems
from moe_train.config.classifier_rules import classifier_problems, has_expert_head, task_problems
from moe_train.config.deepspeed_rules import deepspeed_problems
from moe_train.config.depth_rules import depth_problems
from moe_train.config.exchange_rules import exchange_problems
from moe_train.config.graph_rules import graph_problems
from moe_train.config.label_rules import label_problems
from moe_train.config.model import ModelConfig
from moe_train.config.placement_rules import placement_problems
from moe_train.config.remat_rules import remat_problems
from moe_train.config.routing_rules import group_layout_problems, noop_problems, routing_problems
from moe_train.config.schema import DataConfig, SourceConfig, TokenizerConfig, TrainConfig
from moe_train.config.shard_rules import shard_problems
from moe_train.errors import ConfigError, Problem


def data_problems(data: DataConfig, tokenizer: TokenizerConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of data and tokenizer."""
    yield from path_problems("data", data)
    if data.source == "mix" and not data.parts:
        yield Problem(
            "data.parts", "{}", "a mix needs at least one part", "choose data=mix or set data.parts.LABEL.source"
        )
    if data.source != "mix" and data.parts:
        rule = f"are not read by data.source={data.source}"
        yield Problem("data.parts", ",".join(data.parts), rule, "set data.source=mix, or leave them out")
    for label, part in data.parts.items():
        if part.source in ("mix", "tokens"):
            yield Problem(f"data.parts.{label}.source", part.source, "a mix holds texts only", "name a text source")
        yield from path_problems(f"data.parts.{label}", part)
    if tokenizer.kind == "file" and tokenizer.path is None:
        yield Problem("tokenizer.path", None, "is required for tokenizer.kind=file", "set it to a tokenizer.json")
    if tokenizer.kind != "file" and tokenizer.path is not None:
        rule = f"is not read by tokenizer.kind={tokenizer.kind}"
        yield Problem("tokenizer.path", tokenizer.path, rule, "set tokenizer.kind=file, or leave it out")
    for key in tokenizer.reading() if tokenizer.kind != "bpe" else ():
        yield Problem(f"tokenizer.{key}", True, f"tokenizer.kind={tokenizer.kind} reads text as it is", "leave it out")


def path_problems(key: str, source: SourceConfig) -> Iterator[Problem]:
    """Yield a path that is missing, or that nothing reads: the run would learn another text than its user thinks."""
    has_place = source.source in ("text", "huggingface", "tokens")
    if has_place and source.path is None:
        yield Problem(f"{key}.path", None, f"is required for {key}.source={source.source}", f"set {key}.path=...")
    if not has_place and source.path is not None:
        remedy = "choose data=text, labelled, huggingface or tokens" if key == "data" else f"set {key}.source=text"
        yield Problem(
            f"{key}.path", source.path, f"is not read by {key}.source={source.source}", f"{remedy}, or leave it out"
        )


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of model."""
    yield from classifier_problems(model)
    if model.layers:
        yield from attention_problems(model)
    if model.head_bias and model.tie_embeddings:
        yield Problem("model.head_bias", True, "needs a head of its own", "set model.tie_embeddings=false")
    if model.adopt and model.init_from is None:
        yield Problem("model.adopt", True, "needs a folder to take the architecture from", "set model.init_from=DIR")
    yield from expert_problems(model)
    yield from depth_problems(model)


def expert_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of the feed-forward layers."""
    ffn = model.ffn
    yield from noop_problems(ffn)
    if ffn.num_experts == 0:
        if ffn.graph is not None:
            yield Problem("model.ffn.graph", "set", "couples experts, and there are none", "set model.ffn.num_experts")
        return
    if model.layers // ffn.every * ffn.every <= ffn.first_dense and not has_expert_head(model):
        key = "first_dense" if ffn.first_dense else "every"
        yield Problem(
            f"model.ffn.{key}",
            getattr(ffn, key),
            f"leaves no MoE layer among model.layers={model.layers}",
            "lower it",
        )
    for key in ("shared_dim", "shared_gate"):
        if getattr(ffn, key) and not ffn.num_shared_experts:
            yield Problem(
                f"model.ffn.{key}",
                getattr(ffn, key),
                "describes shared experts, and there are none",
                "set model.ffn.num_shared_experts, or leave it out",
            )
    yield from routing_problems(ffn) if ffn.graph is None else graph_problems(ffn, ffn.graph)


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


def layout_problems(ep: int, num_experts: int, world_size: int, model: ModelConfig | None = None) -> Iterator[Problem]:
    """Yield what is wrong between EP size, experts and ranks.

    Args:
        ep: ranks of an expert-parallel group.
        num_experts: experts of a feed-forward layer.
        world_size: ranks.
        model: whose attention may have experts, too; None: it has none.
    """
    if world_size % ep:
        yield Problem(
            "parallel.ep",
            ep,
            f"must divide the number of ranks, {world_size}",
            f"start a multiple of {ep} ranks (torchrun --nproc-per-node) or lower parallel.ep",
        )
    attends_by_experts = model is not None and has_head_experts(model)
    if ep > 1 and num_experts == 0 and not attends_by_experts:
        yield Problem(
            "parallel.ep", ep, "a dense model has no experts to shard", "set parallel.ep=1 or choose a MoE model"
        )
    elif num_experts % ep:
        yield Problem("parallel.ep", ep, f"must divide model.ffn.num_experts={num_experts}", "change one of them")
    if model is not None:
        yield from head_layout_problems(ep, model)


def schedule_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what is wrong between lengths."""
    if config.data.seq_len <= config.model.mtp.depth:
        yield Problem(
            "model.mtp.depth",
            config.model.mtp.depth,
            f"looks further ahead than data.seq_len={config.data.seq_len}",
            "lower it",
        )
    longest = config.model.max_positions
    if longest is not None and longest < config.data.seq_len:
        rule = f"is shorter than data.seq_len={config.data.seq_len}"
        yield Problem("model.max_positions", longest, rule, "raise it, or shorten the texts")
    if config.optim.warmup_steps > config.train.steps:
        yield Problem(
            "optim.warmup_steps",
            config.optim.warmup_steps,
            f"must not exceed train.steps={config.train.steps}",
            "lower it or train longer",
        )


def start_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield what is wrong between the first weights and the text that they are trained on."""
    if config.model.init_from is not None and config.tokenizer.kind == "bpe":
        yield Problem(
            "tokenizer.kind",
            "bpe",
            "the embedding of model.init_from belongs to the tokenizer that it was trained with, not to a new one",
            "set tokenizer.kind=file tokenizer.path=DIR/tokenizer.json",
        )


def embedding_rows(model: ModelConfig, num_tokens: int) -> int:
    """Return the rows of the embedding for a tokenizer with so many tokens; known only when that is read.

    Raises:
        ConfigError: the configured rows are too few.
    """
    rows = num_tokens if model.vocab_size is None else model.vocab_size
    if rows < num_tokens:
        rule = f"the tokenizer has {num_tokens} tokens"
        raise ConfigError(Problem("model.vocab_size", rows, rule, "raise it, or choose the model's own tokenizer"))
    return rows


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
        lambda: label_problems(config.data, config.task),
        lambda: task_problems(config),
        lambda: model_problems(config.model),
        lambda: batch_problems(config, world_size),
        lambda: layout_problems(config.parallel.ep, config.model.ffn.num_experts, world_size, config.model),
        lambda: group_layout_problems(config.model.ffn, config.parallel.ep),
        lambda: schedule_problems(config),
        lambda: start_problems(config),
        lambda: shard_problems(config, world_size),
        lambda: deepspeed_problems(config, world_size),
        lambda: exchange_problems(config, world_size),
        lambda: remat_problems(config, world_size),
        lambda: placement_problems(config, world_size),
    ]
    return [problem for check in checks for problem in check()]
