"""Rules across fields. Each returns its problems; all are asked, so that a user sees every mistake at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from moe_train.config.attention import GroupedQueryConfig, RotaryConfig
from moe_train.config.deepspeed_rules import deepspeed_problems
from moe_train.config.exchange_rules import exchange_problems
from moe_train.config.graph_rules import graph_problems
from moe_train.config.model import ModelConfig
from moe_train.config.placement_rules import placement_problems
from moe_train.config.remat_rules import remat_problems
from moe_train.config.routing_rules import routing_problems
from moe_train.config.schema import DataConfig, TokenizerConfig, TrainConfig
from moe_train.config.shard_rules import shard_problems
from moe_train.errors import ConfigError, Problem


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
    if isinstance(model.attention, GroupedQueryConfig):
        yield from grouped_query_problems(model, model.attention)
    elif model.attention.rope_dim % 2:
        yield Problem(
            "model.attention.rope_dim",
            model.attention.rope_dim,
            "rotary positions turn pairs: must be even",
            "choose another",
        )
    yield from stretching_problems(model.attention)
    yield from position_problems(model)
    if model.head_bias and model.tie_embeddings:
        yield Problem("model.head_bias", True, "needs a head of its own", "set model.tie_embeddings=false")
    if model.adopt and model.init_from is None:
        yield Problem("model.adopt", True, "needs a folder to take the architecture from", "set model.init_from=DIR")
    yield from expert_problems(model)


def position_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with how positions enter."""
    attention, longest = model.attention, model.max_positions
    if model.positions == "rotary":
        if longest is not None:
            rule = "is the number of learned positions, and positions are rotary"
            yield Problem("model.max_positions", longest, rule, "set model.positions=learned or leave it out")
        return
    if longest is None:
        rule = "learned positions need a longest text"
        yield Problem("model.max_positions", None, rule, "set it to data.seq_len or more")
    if not isinstance(attention, GroupedQueryConfig):
        rule = "latent attention has rotary positions"
        yield Problem("model.positions", model.positions, rule, "leave it out, or choose model/attention=gqa")
    for key in ("yarn", "llama3"):
        if getattr(attention, key) is not None:
            rule = "stretches rotary positions, and positions are learned"
            yield Problem(f"model.attention.{key}", "set", rule, "leave it out, or set model.positions=rotary")


def stretching_problems(rotary: RotaryConfig) -> Iterator[Problem]:
    """Yield what is wrong with how rotary positions are stretched to longer texts."""
    yarn, llama3 = rotary.yarn, rotary.llama3
    if yarn is not None and llama3 is not None:
        yield Problem("model.attention.llama3", None, "positions are stretched by yarn already", "leave one out")
    if yarn is not None and yarn.beta_fast <= yarn.beta_slow:
        yield Problem(
            "model.attention.yarn.beta_fast",
            yarn.beta_fast,
            f"must exceed beta_slow={yarn.beta_slow}: between them frequencies are blended",
            "raise it, or lower beta_slow",
        )
    if llama3 is not None and llama3.high_freq_factor <= llama3.low_freq_factor:
        yield Problem(
            "model.attention.llama3.high_freq_factor",
            llama3.high_freq_factor,
            f"must exceed low_freq_factor={llama3.low_freq_factor}: between them frequencies are blended",
            "raise it, or lower low_freq_factor",
        )


def grouped_query_problems(model: ModelConfig, attention: GroupedQueryConfig) -> Iterator[Problem]:
    """Yield what is wrong between the heads of grouped-query attention."""
    width = attention.head_dim or model.dim // model.heads
    if attention.head_dim is None and model.dim % model.heads:
        yield Problem(
            "model.heads",
            model.heads,
            f"must divide model.dim={model.dim}",
            "change one of them, or set model.attention.head_dim",
        )
    elif width % 2:
        key, value = ("model.heads", model.heads) if attention.head_dim is None else ("model.attention.head_dim", width)
        yield Problem(
            key,
            value,
            f"rotary positions need an even head width, not {width}",
            "change model.dim, model.heads or model.attention.head_dim",
        )
    if attention.kv_heads is not None and model.heads % attention.kv_heads:
        yield Problem(
            "model.attention.kv_heads",
            attention.kv_heads,
            f"must divide model.heads={model.heads}",
            "change one of them",
        )
    if attention.full_every is not None and attention.window is None:
        yield Problem(
            "model.attention.full_every",
            attention.full_every,
            "says which layers have no window, and there is none",
            "set model.attention.window, or leave it out",
        )
    if attention.yarn is not None and attention.yarn.mscale_all_dim:
        yield Problem(
            "model.attention.yarn.mscale_all_dim",
            attention.yarn.mscale_all_dim,
            "scales the scores of latent attention only",
            "leave it out, or choose model/attention=mla",
        )


def expert_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of the feed-forward layers."""
    ffn = model.ffn
    if ffn.num_experts == 0:
        if ffn.graph is not None:
            yield Problem("model.ffn.graph", "set", "couples experts, and there are none", "set model.ffn.num_experts")
        return
    if model.layers // ffn.every * ffn.every <= ffn.first_dense:
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
        lambda: model_problems(config.model),
        lambda: batch_problems(config, world_size),
        lambda: layout_problems(config.parallel.ep, config.model.ffn.num_experts, world_size),
        lambda: schedule_problems(config),
        lambda: start_problems(config),
        lambda: shard_problems(config, world_size),
        lambda: deepspeed_problems(config, world_size),
        lambda: exchange_problems(config, world_size),
        lambda: remat_problems(config, world_size),
        lambda: placement_problems(config, world_size),
    ]
    return [problem for check in checks for problem in check()]
