"""One layer to be timed: its sizes, its tokens, weights and gradient, the same in every process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from moe_train.config.bench import BenchConfig, LayerBench, Routing, Shape
from moe_train.config.model import Compute, FFNConfig, ModelConfig
from moe_train.models.sizes import network_size

LOGIT_STD: Final = 1.0
"""Standard deviation of the logits over tokens, before what makes them skewed."""
WEIGHT_STD: Final = ModelConfig().init_std
"""The same of the experts' weights."""


@dataclass(frozen=True)
class LayerCase:
    """Sizes and routing of a layer; JSON can carry it.

    Attributes:
        experts: E.
        top_k: K.
        expert_dim: hidden width F of one expert.
        tokens: T.
        dim: width D of a token.
        routing: how tokens spread over experts.
        precision: number format of activations.
        seed: of all values.
    """

    experts: int
    top_k: int
    expert_dim: int
    tokens: int
    dim: int
    routing: Routing
    precision: Literal["bf16", "fp32"]
    seed: int

    @staticmethod
    def of(config: BenchConfig, bench: LayerBench, shape: Shape, routing: Routing) -> LayerCase:
        """Return one case of a configuration."""
        sizes = (shape.experts, shape.top_k, shape.expert_dim, bench.tokens, bench.dim)
        return LayerCase(*sizes, routing, config.precision, config.seed)

    @staticmethod
    def parse(arguments: Mapping[str, Any]) -> LayerCase:
        """Return the case of `arguments`."""
        return LayerCase(**arguments)

    def arguments(self) -> dict[str, Any]:
        """Return what JSON can carry."""
        return asdict(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def dense(self) -> LayerCase:
        """The dense twin: one expert of width K · F for all tokens, of equal active FLOPs."""
        width = self.top_k * self.expert_dim
        sizes = (1, 1, width, self.tokens, self.dim)
        return LayerCase(*sizes, self.routing, self.precision, self.seed)

    @property
    def gflop(self) -> float:
        """Operations of the experts' products in one forward and backward pass, in units of 1e9; no router."""
        expert = network_size(self.dim, self.expert_dim, "swiglu")
        return 3 * 2 * self.tokens * self.top_k * expert.multiplied / 1e9

    def ffn(self, compute: Compute) -> FFNConfig:
        """Return this project's configuration: softmax, the K largest, normalised; dropless, no balance loss."""
        return FFNConfig(num_experts=self.experts, top_k=self.top_k, expert_dim=self.expert_dim, compute=compute)


def shape_label(shape: Shape) -> str:
    """Return the shape as tables show it."""
    return f"E={shape.experts} K={shape.top_k} F={shape.expert_dim}"


@dataclass(frozen=True)
class LayerData:
    """Values of a case.

    Every weight is a bf16 number, whatever its dtype, so that layers with weights in bf16 have the same ones.

    Attributes:
        x_BSD: [1, T, D] tokens, in the dtype of activations; the last feature is 1 for all.
        gradient_BSD: [1, T, D] of the output, in the same dtype.
        router_ED: [E, D] fp32; by its last column the constant feature adds a bias to the logits, for every layer
            alike: not every peer has one of its own.
        gate_up_EDF2: [E, D, 2F] fp32, gate before up.
        down_EFD: [E, F, D] fp32.
    """

    x_BSD: Tensor
    gradient_BSD: Tensor
    router_ED: Tensor
    gate_up_EDF2: Tensor
    down_EFD: Tensor


def draw(case: LayerCase) -> LayerData:
    """Draw the values of a case."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(torch.bfloat16).to(torch.float32)

    x_BSD = normal(1, case.tokens, case.dim, std=1.0)
    x_BSD[..., -1] = 1.0
    router_ED = normal(case.experts, case.dim, std=LOGIT_STD / math.sqrt(case.dim))
    router_ED[:, -1] = router_bias(case).to(torch.bfloat16).to(torch.float32)
    return LayerData(
        x_BSD=x_BSD.to(case.dtype),
        gradient_BSD=normal(1, case.tokens, case.dim, std=1.0).to(case.dtype),
        router_ED=router_ED,
        gate_up_EDF2=normal(case.experts, case.dim, 2 * case.expert_dim, std=WEIGHT_STD),
        down_EFD=normal(case.experts, case.expert_dim, case.dim, std=WEIGHT_STD),
    )


def router_bias(case: LayerCase) -> Tensor:
    """Return what is added to the logits, [E] fp32: nothing, or -log(rank), the logarithm of Zipf's law."""
    if case.routing == "balanced":
        return torch.zeros(case.experts)
    return -torch.arange(1, case.experts + 1, dtype=torch.float32).log()
