"""Experts and tokens for the tests of expert_ffn, and the comparison with the reference."""

from dataclasses import dataclass, fields
from typing import get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.model import Activation, Compute
from moe_train.ops.activation import inner_width
from moe_train.ops.expert_ffn import Networks, expert_ffn

DIM, HIDDEN = 6, 4
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
METHODS: tuple[Compute, ...] = ("loop", "bmm", "grouped_mm", "auto")


@dataclass(frozen=True)
class Case:
    """Tokens with their choices; the number of experts stands for none."""

    rows_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor
    networks: Networks

    @property
    def leaves(self) -> list[Tensor]:
        parameters = (getattr(self.networks, field.name) for field in fields(Networks))
        return [self.rows_RD, self.weights_RK, *(p for p in parameters if isinstance(p, Tensor))]

    def run(self, method: Compute) -> Tensor:
        arrived = int((self.experts_RK < self.networks.num_held).sum())
        return expert_ffn(self.rows_RD, self.experts_RK, self.weights_RK, arrived, self.networks, method)

    def results(self, method: Compute) -> list[Tensor]:
        """Sums, then the gradients of tokens, weights and parameters."""
        y_RD = self.run(method)
        upstream = random(*y_RD.shape, seed=9).to(y_RD.dtype)
        return [y_RD, *torch.autograd.grad(y_RD, self.leaves, upstream, allow_unused=True, materialize_grads=True)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case_of(
    rows: list[list[int]],
    held: int,
    activation: Activation = "swiglu",
    biased: bool = False,
    dtype: torch.dtype = torch.float64,
    master: torch.dtype = torch.float64,
    dim: int = DIM,
) -> Case:
    experts_RK = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)
    inner = inner_width(activation, HIDDEN)
    shapes = [(held, dim, inner), (held, HIDDEN, dim), (held, inner), (held, dim)]
    tensors = [random(*shape, seed=20 + i).to(master).requires_grad_() for i, shape in enumerate(shapes)]
    biases = tensors[2:] if biased else [None, None]
    # What stands where there is no expert must never be looked at.
    weights_RK = torch.where(experts_RK < held, random(*experts_RK.shape, seed=1).abs(), torch.nan)
    rows_RD = random(len(rows), dim, seed=2).to(dtype).requires_grad_()
    return Case(rows_RD, experts_RK, weights_RK.requires_grad_(), Networks(*tensors[:2], *biases, activation))


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Choices of up to 40 tokens, and the number of experts; any of them may be busy, idle, or taken by all."""
    held, k, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 40))
    favourites = draw(st.lists(st.integers(0, held), min_size=1, max_size=held + 1))
    row = st.lists(st.sampled_from(favourites), min_size=k, max_size=k)
    return draw(st.lists(row, min_size=tokens, max_size=tokens)), held
