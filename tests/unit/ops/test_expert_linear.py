"""The linear maps of heads' experts against a loop over assignments: all methods, both sides, any load."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from ffn_samples import METHODS, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.model import Compute
from moe_train.ops.expert_ffn import compute as door
from moe_train.ops.expert_linear import Heads, expert_linear, expert_linear_reference

WIDE, NARROW, EXPERTS, TAKEN = 6, 4, 3, 2
"""Widths on both sides, experts of each head, and how many of them a token takes."""
SIDES: tuple[Literal["in", "out"], ...] = ("in", "out")
EACH_SIDE = pytest.mark.parametrize("side", SIDES)
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let torch fill fresh memory with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Tokens with their choices, by head; the number of experts held stands for none."""

    def __init__(self, rows: list[list[int]], held: int, heads: Heads, dtype: torch.dtype, master: torch.dtype) -> None:
        self.heads, self.held = heads, held
        self.experts_RK = torch.tensor(rows, dtype=torch.int64).view(len(rows), heads.number * TAKEN)
        read, made = (NARROW, WIDE) if heads.side == "in" else (WIDE, NARROW)
        parts = heads.number if heads.side == "in" else 1
        self.rows_RD = random(len(rows), parts * read, seed=2).to(dtype).requires_grad_()
        # What stands where there is no expert must never be looked at.
        weights_RK = torch.where(self.experts_RK < held, random(*self.experts_RK.shape, seed=1).abs(), torch.nan)
        self.weights_RK = weights_RK.requires_grad_()
        self.w_LDF = random(held, read, made, seed=20).to(master).requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.rows_RD, self.weights_RK, self.w_LDF]

    def run(self, method: Compute) -> Tensor:
        arrived = int((self.experts_RK < self.held).sum())
        return expert_linear(self.rows_RD, self.experts_RK, self.weights_RK, arrived, self.w_LDF, self.heads, method)

    def results(self, method: Compute) -> list[Tensor]:
        y_RF = self.run(method)
        upstream = random(*y_RF.shape, seed=9).to(y_RF.dtype)
        return [y_RF, *torch.autograd.grad(y_RF, self.leaves, upstream, allow_unused=True, materialize_grads=True)]


def case_of(rows, held, heads, dtype=torch.float64, master=torch.float64) -> Case:
    return Case(rows, held, heads, dtype, master)


def assert_equal(rows: list[list[int]], held: int, heads: Heads, method: Compute) -> None:
    dtype = torch.float32 if method == "grouped_mm" else torch.float64
    tolerance = 2e-6 if method == "grouped_mm" else 1e-12
    found = case_of(rows, held, heads, dtype, dtype).results(method)
    for a, b in zip(found, case_of(rows, held, heads).results("reference"), strict=True):
        assert a.shape == b.shape
        assert ((a - b).abs() <= tolerance * max(1.0, b.abs().max() if b.numel() else 0.0)).all()


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Choices of up to 20 tokens, the experts held, the heads: a rank may hold those of some heads only."""
    heads, held, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 20))
    favourites = draw(st.lists(st.integers(0, held), min_size=1, max_size=held + 1))
    row = st.lists(st.sampled_from(favourites), min_size=heads * TAKEN, max_size=heads * TAKEN)
    return draw(st.lists(row, min_size=tokens, max_size=tokens)), held, heads


@settings(max_examples=60, deadline=None)
@given(choices(), st.sampled_from(SIDES), st.sampled_from(METHODS), st.booleans())
def test_any_choices_of_heads(
    chosen: tuple[list[list[int]], int, int], side: Literal["in", "out"], method: Compute, is_rounded: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if is_rounded:
            patch.setattr(door, "BUILT_BY_SHAPE", (torch.float64,))
            patch.setattr(door, "BLOCK_ROWS", 20)
        rows, held, heads = chosen
        assert_equal(rows, held, Heads(heads, side), method)


BUSY = [[0, 1, 4, 3], [1, 2, 3, 5], [2, 0, 6, 6], [0, 6, 4, 5]]
"""Two heads of three experts, two choices each; 6 stands for none."""


@EACH_SIDE
@EACH_METHOD
def test_experts_without_rows_and_ranks_without_tokens(side: Literal["in", "out"], method: Compute) -> None:
    heads = Heads(2, side)
    for rows in (BUSY, [[0, 2, 3, 5]], [[6, 6, 6, 6]], []):
        assert_equal(rows, 6, heads, method)


@EACH_SIDE
def test_the_reference_is_the_formula(side: Literal["in", "out"]) -> None:
    """By hand, for one token with one expert of each head's."""
    case = case_of([[1, 6, 6, 4]], 6, Heads(2, side))
    x, w, weight = case.rows_RD[0], case.w_LDF, case.weights_RK[0]
    if side == "out":
        expected = torch.cat([weight[0] * (x @ w[1]), weight[3] * (x @ w[4])])
    else:
        expected = weight[0] * (x[:NARROW] @ w[1]) + weight[3] * (x[NARROW:] @ w[4])
    found = expert_linear_reference(case.rows_RD, case.experts_RK, case.weights_RK, case.w_LDF, case.heads)
    torch.testing.assert_close(found[0], expected, rtol=1e-13, atol=0)


@EACH_SIDE
def test_gradients_are_those_of_differences(side: Literal["in", "out"]) -> None:
    case = case_of([[0, 1, 4, 3], [2, 1, 3, 5]], 6, Heads(2, side))

    def run(rows_RD: Tensor, weights_RK: Tensor, w_LDF: Tensor) -> Tensor:
        return expert_linear(rows_RD, case.experts_RK, weights_RK, 8, w_LDF, case.heads)

    assert torch.autograd.gradcheck(run, case.leaves)


@EACH_SIDE
@EACH_METHOD
@pytest.mark.parametrize("frozen", range(3))
def test_what_needs_no_gradient_changes_none(side: Literal["in", "out"], method: Compute, frozen: int) -> None:
    dtype = torch.float32 if method == "grouped_mm" else torch.float64
    expected = case_of(BUSY, 6, Heads(2, side), dtype, dtype).results(method)[1:]
    case = case_of(BUSY, 6, Heads(2, side), dtype, dtype)
    case.leaves[frozen].requires_grad_(False)
    y_RF = case.run(method)
    wanted = [leaf for place, leaf in enumerate(case.leaves) if place != frozen]
    found = torch.autograd.grad(y_RF, wanted, random(*y_RF.shape, seed=9).to(dtype))
    for a, b in zip(found, [g for place, g in enumerate(expected) if place != frozen], strict=True):
        assert torch.equal(a, b)


@EACH_SIDE
@EACH_METHOD
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_bf16_heads(side: Literal["in", "out"], method: Compute, master: torch.dtype) -> None:
    """Gradients have the dtype of what they belong to; errors are those of a few roundings."""
    case = case_of(BUSY, 6, Heads(2, side), torch.bfloat16, master)
    exact = case_of(BUSY, 6, Heads(2, side)).results("reference")
    for found, expected, leaf in zip(case.results(method), exact, [case.rows_RD, *case.leaves], strict=True):
        assert found.dtype == leaf.dtype
        assert (found.double() - expected).norm() <= 2.0**-6 * expected.norm()
