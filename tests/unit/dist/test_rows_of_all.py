"""The all-gather of rows and the reduce-scatter that is its adjoint: values, gradients, cost, and what may be kept."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from mesh_checks import Check, failures, said_of
from spawn import run_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_train.dist.comm import METER, gather_rows_of_all, sum_rows_of_all
from moe_train.dist.mesh import Mesh

ROWS, SHAPE = 3, (2, 5)
"""Of one rank, and the shape of a row."""
BOTH = {"gather": gather_rows_of_all, "sum": sum_rows_of_all}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def group_of(mesh: Mesh) -> tuple[int, str]:
    return mesh.ep.size(), mesh.ep.group_name


def rows(rank: int, num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a rank of the world has: whole numbers, so that any order of a sum is exact."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, (num, *SHAPE), generator=generator).to(dtype)


def members(mesh: Mesh) -> list[int]:
    """Ranks of the EP group, from the layout's rule that these are consecutive."""
    size = mesh.ep.size()
    return list(range(mesh.rank // size * size, mesh.rank // size * size + size))


def check_values(mesh: Mesh) -> None:
    size, name = group_of(mesh)
    for dtype in DTYPES:
        for num in (ROWS, 0):
            gathered = gather_rows_of_all(rows(mesh.rank, num, dtype), size, name)
            assert gathered.dtype == dtype
            assert torch.equal(gathered, torch.cat([rows(rank, num, dtype) for rank in members(mesh)]))
            summed = sum_rows_of_all(rows(mesh.rank, num * size, dtype), size, name)
            everybody = sum(rows(rank, num * size, dtype) for rank in members(mesh))
            assert summed.dtype == dtype
            assert torch.equal(summed, everybody[mesh.ep_rank * num :][:num])
    across = rows(mesh.rank, ROWS).transpose(0, 2)
    assert torch.equal(
        gather_rows_of_all(across, size, name), torch.cat([rows(rank, ROWS).transpose(0, 2) for rank in members(mesh)])
    ), "rows need not lie one after the other"


def check_adjoint(mesh: Mesh) -> None:
    """<A x, y> = <x, Aᵀ y>, summed over the ranks; Aᵀ of the one is the other; again after a backward pass."""
    size, name = group_of(mesh)
    for kind, adjoint, num in (("gather", "sum", ROWS), ("sum", "gather", ROWS * size)):
        x_ND = rows(mesh.rank, num).requires_grad_()
        for attempt in range(2):
            there = BOTH[kind](x_ND, size, name)
            y = rows(10 + 5 * attempt + mesh.rank, len(there))
            (back_ND,) = torch.autograd.grad(there, x_ND, y)
            assert torch.equal(back_ND, BOTH[adjoint](y, size, name)), kind
            products = torch.stack([(there * y).sum(), (x_ND * back_ND).sum()]).detach()
            dist.all_reduce(products, group=mesh.ep)
            assert products[0] == products[1], kind
            assert products[0] != 0


def check_gradient_dtypes(mesh: Mesh) -> None:
    """A gradient travels as what it is of."""
    size, name = group_of(mesh)
    for dtype in DTYPES:
        x_ND = rows(mesh.rank, ROWS, dtype).requires_grad_()
        (gather_rows_of_all(x_ND, size, name).square().sum() / 2).backward()
        assert x_ND.grad.dtype == dtype
        assert torch.equal(x_ND.grad, size * x_ND.detach())


def check_gradient_of_gradient(mesh: Mesh) -> None:
    """Of |A x|² / 2 on every rank: Aᵀ A x = P x, whose derivative towards v is P v."""
    size, name = group_of(mesh)
    x_ND, v_ND = rows(mesh.rank, ROWS).requires_grad_(), rows(20 + mesh.rank, ROWS)
    half = gather_rows_of_all(x_ND, size, name).square().sum() / 2
    (gradient_ND,) = torch.autograd.grad(half, x_ND, create_graph=True)
    (second_ND,) = torch.autograd.grad(gradient_ND, x_ND, v_ND)
    assert torch.equal(gradient_ND, size * x_ND)
    assert torch.equal(second_ND, size * v_ND)


def check_meter(mesh: Mesh) -> None:
    """Given to other ranks and to itself: by a gather each row P times, by a sum each row once."""
    size, name = group_of(mesh)
    for dtype in DTYPES:
        row_bytes = SHAPE[0] * SHAPE[1] * dtype.itemsize
        for kind, num in (("gather", ROWS), ("sum", ROWS * size)):
            x_ND = rows(mesh.rank, num, dtype).requires_grad_()
            METER.take_ms()
            there = BOTH[kind](x_ND, size, name)
            assert (METER.calls, METER.sent_bytes) == (1, ROWS * size * row_bytes)
            there.sum().backward()
            assert (METER.calls, METER.sent_bytes) == (2, 2 * ROWS * size * row_bytes)
            assert METER.take_ms() > 0


def check_fake(mesh: Mesh) -> None:
    """Shapes are known without a message, on the meta device and under a fake mode, gradients included."""
    size, name = group_of(mesh)
    METER.take_ms()
    for mode in (FakeTensorMode(), torch.device("meta")):
        for kind, num, after in (("gather", ROWS, ROWS * size), ("sum", ROWS * size, ROWS)):
            with mode:
                x_ND = torch.empty(num, *SHAPE, dtype=torch.bfloat16, requires_grad=True)
                there = BOTH[kind](x_ND, size, name)
                there.sum().backward()
            assert (there.shape, there.dtype) == ((after, *SHAPE), torch.bfloat16)
            assert (x_ND.grad.shape, x_ND.grad.device) == (x_ND.shape, x_ND.device)
    assert METER.calls == 0


def check_operators(mesh: Mesh) -> None:
    """What torch asks of an operator: schema, autograd, fake tensors, and all of them traced together."""
    size, name = group_of(mesh)
    for operator, num in ((gather_rows_of_all, ROWS), (sum_rows_of_all, ROWS * size)):
        results = torch.library.opcheck(operator, (rows(mesh.rank, num).requires_grad_(), size, name))
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}


def keep(operators: set[object], context: object, operator: object, *args: object, **kwargs: object) -> object:
    return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE


def check_what_is_recomputed(mesh: Mesh) -> None:
    """A checkpoint that keeps what came does not ask for it again; one that keeps nothing does."""
    size, name = group_of(mesh)
    operators = {torch.ops.moe_train.gather_rows_of_all.default, torch.ops.moe_train.sum_rows_of_all.default}

    def work(x_ND: Tensor) -> Tensor:
        return sum_rows_of_all(gather_rows_of_all(x_ND.sin(), size, name).cos(), size, name).exp()

    found = {}
    for kind, kept in {"no checkpoint": None, "kept": operators, "recomputed": set()}.items():
        x_ND = rows(mesh.rank, ROWS).requires_grad_()
        METER.take_ms()
        if kept is None:
            y_ND = work(x_ND)
        else:
            contexts = partial(create_selective_checkpoint_contexts, partial(keep, kept))
            y_ND = checkpoint(work, x_ND, use_reentrant=False, context_fn=contexts)
        y_ND.sum().backward()
        found[kind] = (x_ND.grad, METER.calls)
    assert [calls for _, calls in found.values()] == [4, 4, 6]
    for gradient_ND, _ in found.values():
        assert torch.equal(gradient_ND, found["no checkpoint"][0])


CHECKS = (
    check_values,
    check_adjoint,
    check_gradient_dtypes,
    check_gradient_of_gradient,
    check_meter,
    check_fake,
    check_operators,
    check_what_is_recomputed,
)


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, str]]:
    """By rank."""
    return run_ranks(failures, 4, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rows_of_all(wrong: list[dict[str, str]], check: Check) -> None:
    assert said_of(check, wrong) == []
