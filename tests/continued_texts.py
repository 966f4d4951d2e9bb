"""Small models of every kind whose texts are continued, with and without memory."""

from __future__ import annotations

import torch

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import SampleConfig, TrainConfig
from moe_train.inference.sampler import Reader
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import LocalExchange

VOCAB, PROMPT, LENGTH = 23, 5, 19
SMALL = (
    "model.dim=16", "model.layers=2", "model.heads=4", "model.init_std=0.3",
    "model.ffn.num_experts=4", "model.ffn.expert_dim=6",
)  # fmt: skip
MLA = (
    "model.attention.kind=mla", "model.attention.kv_rank=6", "model.attention.nope_dim=3", "model.attention.rope_dim=4",
    "model.attention.v_dim=5",
)  # fmt: skip
TWO_KEY_HEADS = ("model.attention.kv_heads=2",)
MODELS: dict[str, tuple[str, ...]] = {
    "sparse, two key heads": TWO_KEY_HEADS,
    "dense": ("model=dense_tiny", "model.ffn.num_experts=0", "model.ffn.hidden_dim=10"),
    "norms of heads, shared expert with a gate": (
        "model.attention.qk_norm=head", "model.ffn.num_shared_experts=1", "model.ffn.shared_gate=true",
    ),
    "norms over all heads, every other layer": ("model.attention.qk_norm=full", "model.ffn.every=2"),
    "window, sinks, every second layer full": (
        *TWO_KEY_HEADS, "model.attention.window=4", "model.attention.sinks=true", "model.attention.full_every=2",
        "model.layers=3",
    ),
    "learned positions": ("model.positions=learned", "model.max_positions=64", "model.norm=layer"),
    "YaRN": ("model.attention.yarn.factor=4.0", "model.attention.yarn.original_length=8"),
    "latent": MLA,
    "latent, compressed queries, YaRN, groups, first dense, module ahead": (
        *MLA, "model.attention.q_rank=5", "model.attention.yarn.factor=8.0", "model.attention.yarn.original_length=16",
        "model.attention.yarn.mscale_all_dim=0.7", "model.ffn.first_dense=1", "model.ffn.router.kind=group_limited",
        "model.ffn.router.groups=2", "model.ffn.router.top_groups=1", "model.mtp.depth=1",
    ),
    "deepseek_tiny": ("model=deepseek_tiny", *TWO_KEY_HEADS, "model.ffn.top_k=2"),
    "coupled experts": ("model=graph_tiny", *TWO_KEY_HEADS),
    "hash": ("model.ffn.router.kind=hash",),
    "capacity in training alone": ("model.ffn.capacity.kind=factor", "model.ffn.capacity.factor=0.5"),
    "buffers of fixed size": ("model.ffn.capacity.kind=factor", "model.ffn.capacity.pad=true"),
    "device budget": ("model.ffn.capacity.kind=device", "model.ffn.capacity.devices=2"),
    "experts in attention": (
        "model.attention.kind=switchhead", "model.attention.experts=2", "model.attention.top_k=1",
    ),
    "half of the blocks for some, by a predictor": (
        "model.depth.kind=mixture_of_depths", "model.depth.capacity=0.5", "model.layers=4",
    ),
    "every block for some, by the score, with a window": (
        "model.depth.kind=mixture_of_depths", "model.depth.every=1", "model.depth.causal=classifier",
        "model.attention.window=4",
    ),
    "expert choice": ("model.ffn.router.kind=expert_choice", "model.ffn.router.allow_future_leak=true"),
}  # fmt: skip
WHOLE = {
    "experts that are blocks": ("model=graph_block_tiny",),
    "capacity in evaluation": ("model.ffn.capacity.kind=factor", "model.ffn.capacity.eval_factor=0.5"),
}
"""Models that must see the whole text."""


def config_of(*overrides: str) -> ModelConfig:
    """A small model with changes; rules across fields are not asked."""
    return compose_config("train", TrainConfig, lambda config: [], [*SMALL, *overrides]).model


def filled(model: Transformer) -> Transformer:
    """With values, those included that start at zero and would hide."""
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks_H"):
            parameter.data.normal_(generator=generator)
    return model.eval()


def built(overrides: tuple[str, ...], precision: str = "fp64") -> Transformer:
    """A model that is whole in this process."""
    config = config_of(*overrides)
    exchange = LocalExchange(config.ffn.num_experts)
    return filled(build_model(config, VOCAB, exchange, precision, torch.device("cpu")))


def padded(config: ModelConfig) -> bool:
    """Whether its experts have buffers of fixed size."""
    return is_padded(config.ffn.capacity)


def sample(max_tokens: int = LENGTH - PROMPT, temperature: float = 0.0) -> SampleConfig:
    return SampleConfig(temperature=temperature, max_tokens=max_tokens, top_p=1.0)


def prompt(num: int = PROMPT) -> list[int]:
    tokens_S: list[int] = torch.randint(0, VOCAB, (num,), generator=torch.Generator().manual_seed(0)).tolist()
    return tokens_S


@torch.no_grad()
def scores(model: Transformer, text_S: list[int], remember: bool, context: int = 64) -> torch.Tensor:
    """[S, V]: those after each beginning of a text that is as long as the prompt or longer."""
    reader = Reader(model, context, remember)
    return torch.stack([reader.scores(text_S[:end]) for end in range(PROMPT, len(text_S) + 1)])
