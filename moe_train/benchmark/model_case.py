"""A model to be trained for some steps: its sizes, its tokens, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from moe_train.config.bench import BenchConfig, ModelBench, Shape
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.schema import DataConfig, OptimConfig, TrainConfig, TrainSection
from moe_train.models.counts import count

LEARNING_RATE: Final = 1e-6
"""So small that the routing of the first weights stays: one step is like another."""


@dataclass(frozen=True)
class ModelCase:
    """Sizes of a model and its batch; JSON can carry it.

    Attributes:
        experts: E of every layer; 0: the dense twin.
        top_k: K.
        expert_dim: hidden width F of one expert; the dense twin's layers have K · F.
        layers: blocks.
        dim: width D of the residual stream.
        heads: heads.
        vocab_size: V.
        seq_len: positions S per sequence.
        batch: sequences B per step.
        precision: number format of activations.
        seed: of weights and tokens.
    """

    experts: int
    top_k: int
    expert_dim: int
    layers: int
    dim: int
    heads: int
    vocab_size: int
    seq_len: int
    batch: int
    precision: Literal["bf16", "fp32"]
    seed: int

    @staticmethod
    def of(config: BenchConfig, bench: ModelBench, shape: Shape) -> ModelCase:
        """Return one case of a configuration."""
        sizes = (shape.experts, shape.top_k, shape.expert_dim, bench.layers, bench.dim, bench.heads, bench.vocab_size)
        return ModelCase(*sizes, bench.seq_len, bench.batch, config.precision, config.seed)

    @staticmethod
    def parse(arguments: Mapping[str, Any]) -> ModelCase:
        """Return the case of `arguments`."""
        return ModelCase(**arguments)

    def arguments(self) -> dict[str, Any]:
        """Return what JSON can carry."""
        return asdict(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.seq_len

    def model(self, is_dense: bool = False) -> ModelConfig:
        """Return this project's configuration of the model, or of its dense twin of equal active FLOPs."""
        ffn = FFNConfig(num_experts=self.experts, top_k=self.top_k, expert_dim=self.expert_dim)
        twin = FFNConfig(hidden_dim=self.top_k * self.expert_dim)
        return ModelConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            vocab_size=self.vocab_size,
            ffn=twin if is_dense else ffn,
        )

    def training(self, is_dense: bool, compile: Literal["none", "pointwise", "block"]) -> TrainConfig:
        """Return this project's configuration of the training."""
        return TrainConfig(
            train=TrainSection(global_batch=self.batch, precision=self.precision, compile=compile),
            data=DataConfig(seq_len=self.seq_len),
            model=self.model(is_dense),
            optim=OptimConfig(lr=LEARNING_RATE),
        )

    def gflop(self, is_dense: bool) -> float:
        """Operations of the products of one training step, in units of 1e9."""
        return count(self.model(is_dense), self.vocab_size, self.seq_len).training_flops_per_token * self.tokens / 1e9


def draw_tokens(case: ModelCase) -> tuple[Tensor, Tensor]:
    """Draw the tokens [B, S] of a step, and those after each, [B, S]; int64, evenly over the vocabulary."""
    generator = torch.Generator().manual_seed(case.seed)
    text_BS = torch.randint(case.vocab_size, (case.batch, case.seq_len + 1), generator=generator)
    return text_BS[:, :-1].contiguous(), text_BS[:, 1:].contiguous()
