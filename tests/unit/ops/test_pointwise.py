"""Functions that may be fused: the same values fused, few kernels whatever the sizes, and off again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from moe_train.config.attention import RotaryConfig
from moe_train.ops.activation import activate
from moe_train.ops.linear_loss import linear_cross_entropy_sum
from moe_train.ops.norm import rms_norm
from moe_train.ops.pointwise import fuse, fused, pointwise
from moe_train.ops.rotary import rotary_table, rotate

QUICK = "aot_eager"
"""A backend that traces and takes gradients like the real one, without generating code."""
WIDTH = 16


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test compiles for itself, and leaves nothing fused."""
    torch._dynamo.reset()
    counters.clear()
    yield
    fuse(None)
    torch._dynamo.reset()


def everything(batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Values and gradients of all that is marked, for a batch of this size."""
    generator = torch.Generator().manual_seed(batch * length)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x_BSD, q_BSHW, k_BSGW = (
        leaf(batch, length, WIDTH),
        leaf(batch, length, 4, WIDTH),
        leaf(batch, length, 2, WIDTH),
    )
    weight_D, head_VD, labels_T = leaf(WIDTH), leaf(50, WIDTH), torch.arange(batch * length) % 50
    rotary = rotary_table(length, WIDTH, RotaryConfig(), torch.float32, torch.device("cpu"))
    results = [
        rms_norm(x_BSD, weight_D, 1e-5),
        *(rotate(t.transpose(1, 2), rotary) for t in (q_BSHW, k_BSGW)),
        activate(x_BSD, "swiglu"),
        linear_cross_entropy_sum(x_BSD.flatten(0, 1), head_VD, None, labels_T, 13),
    ]
    total = torch.stack([result.float().square().sum() for result in results]).sum()
    leaves = [x_BSD, q_BSHW, k_BSGW, weight_D, head_VD]
    return [*results, *torch.autograd.grad(total, leaves)]


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_no_graph_more_after_the_first_few_sizes() -> None:
    fuse(QUICK)
    for batch, length in ((3, 8), (5, 8), (7, 12)):
        everything(batch, length)
    few = graphs()
    assert 5 <= few <= 12
    for batch, length in ((9, 8), (2, 16), (11, 3), (6, 40), (3, 8)):
        everything(batch, length)
    assert graphs() == few
    assert not counters["graph_break"]


def check_values(backend: str, bound: float, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        plain = everything(3, 8, dtype)
        with fused(backend):
            found = everything(3, 8, dtype)
        for a, b in zip(found, plain, strict=True):
            assert a.dtype == b.dtype
            limit = bound if dtype == torch.float32 else 2.0**-7
            assert (a - b).abs().max() <= limit * b.abs().max()
    assert graphs() > 0, "nothing was compiled"


def test_traced_gives_the_same_values() -> None:
    check_values(QUICK, 1e-6, torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_generated_code_gives_the_same_values() -> None:
    check_values("inductor", 1e-5, torch.float32, torch.bfloat16)


def test_what_is_marked_later_is_fused_as_well_and_all_of_it_ends() -> None:
    fuse("eager")

    @pointwise
    def twice(x: Tensor) -> Tensor:
        """Return 2 x."""
        return 2 * x

    assert twice.__doc__ == "Return 2 x."
    assert twice.compiled is not None
    form = twice.compiled
    with fused(None):
        assert twice.compiled is None
        assert torch.equal(twice(torch.ones(2)), torch.full((2,), 2.0))
    assert twice.compiled is form, "what was compiled is used again"
    fuse(None)
    assert twice.compiled is None
