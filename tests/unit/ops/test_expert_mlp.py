"""Networks of several maps against a loop over assignments: all methods, any load."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from ffn_samples import METHODS, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.model import Compute
from moe_train.ops.expert_ffn import compute as door
from moe_train.ops.expert_mlp import ExpertMap, expert_mlp, expert_mlp_reference

DIMS = (6, 5, 4, 3)
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let torch fill fresh memory with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Tokens with their choices; the number of experts held stands for none."""

    def __init__(
        self,
        rows: list[list[int]],
        held: int,
        dtype: torch.dtype = torch.float64,
        master: torch.dtype = torch.float64,
        dims: tuple[int, ...] = DIMS,
    ) -> None:
        self.held = held
        self.experts_RK = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1 if rows else 2)
        self.rows_RD = random(len(rows), dims[0], seed=2).to(dtype).requires_grad_()
        # What stands where there is no expert must never be looked at.
        weights_RK = torch.where(self.experts_RK < held, random(*self.experts_RK.shape, seed=1).abs(), torch.nan)
        self.weights_RK = weights_RK.requires_grad_()
        self.maps = [
            ExpertMap(
                random(held, here, there, seed=20 + place).to(master).requires_grad_(),
                random(held, there, seed=30 + place).to(master).requires_grad_(),
            )
            for place, (here, there) in enumerate(pairwise(dims))
        ]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.rows_RD, self.weights_RK, *(tensor for own in self.maps for tensor in own)]

    def run(self, method: Compute) -> Tensor:
        arrived = int((self.experts_RK < self.held).sum())
        return expert_mlp(self.rows_RD, self.experts_RK, self.weights_RK, arrived, self.maps, method)

    def results(self, method: Compute) -> list[Tensor]:
        y_RC = self.run(method)
        upstream = random(*y_RC.shape, seed=9).to(y_RC.dtype)
        return [y_RC, *torch.autograd.grad(y_RC, self.leaves, upstream, allow_unused=True, materialize_grads=True)]


def assert_equal(rows: list[list[int]], held: int, method: Compute) -> None:
    dtype = torch.float32 if method == "grouped_mm" else torch.float64
    tolerance = 3e-6 if method == "grouped_mm" else 1e-12
    found = Case(rows, held, dtype, dtype).results(method)
    for a, b in zip(found, Case(rows, held).results("reference"), strict=True):
        assert a.shape == b.shape
        assert ((a - b).abs() <= tolerance * max(1.0, b.abs().max() if b.numel() else 0.0)).all()


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Two choices each of up to 12 tokens, and the experts held, of which few may be busy."""
    held, tokens = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    favourites = draw(st.lists(st.integers(0, held), min_size=1, max_size=held + 1))
    row = st.lists(st.sampled_from(favourites), min_size=2, max_size=2)
    return draw(st.lists(row, min_size=tokens, max_size=tokens)), held


@settings(max_examples=40, deadline=None)
@given(choices(), st.sampled_from(METHODS), st.booleans())
def test_any_choices(chosen: tuple[list[list[int]], int], method: Compute, is_rounded: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if is_rounded:
            patch.setattr(door, "BUILT_BY_SHAPE", (torch.float64,))
            patch.setattr(door, "BLOCK_ROWS", 5)
        assert_equal(*chosen, method)


@EACH_METHOD
def test_experts_without_rows_and_ranks_without_tokens(method: Compute) -> None:
    for rows in ([[0, 2], [2, 0]], [[1, 3]], [[3, 3]], []):
        assert_equal(rows, 3, method)


def test_the_reference_is_the_formula() -> None:
    """By hand, for one token with one expert of two maps."""
    case = Case([[2, 1]], 2, dims=(6, 4, 3))
    x_D, weight, (first, second) = case.rows_RD[0], case.weights_RK[0, 1], case.maps
    hidden = (x_D @ first.weight_LNM[1] + first.bias_LM[1]).clamp(min=0)
    expected = weight * (hidden @ second.weight_LNM[1] + second.bias_LM[1])
    found = expert_mlp_reference(case.rows_RD, case.experts_RK, case.weights_RK, case.maps)
    torch.testing.assert_close(found[0], expected, rtol=1e-13, atol=0)


def test_gradients_are_those_of_differences() -> None:
    case = Case([[0, 1], [2, 1]], 3, dims=(3, 4, 2))

    def run(*leaves: Tensor) -> Tensor:
        maps = [ExpertMap(*leaves[2:4]), ExpertMap(*leaves[4:6])]
        return expert_mlp(leaves[0], case.experts_RK, leaves[1], 4, maps)

    assert torch.autograd.gradcheck(run, case.leaves)


@EACH_METHOD
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_in_bf16_gradients_have_the_dtype_of_what_they_belong_to(method: Compute, master: torch.dtype) -> None:
    rows = [[0, 1], [1, 2], [0, 3], [2, 0]]
    exact = Case(rows, 3).results("reference")
    case = Case(rows, 3, torch.bfloat16, master)
    found = case.results(method)
    assert [t.dtype for t in found[1:]] == [t.dtype for t in case.leaves]
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).abs().max() <= 0.05 * b.abs().max()
