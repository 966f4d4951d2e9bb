"""The experts' function against plain autograd: all methods, activations, biases, loads; what it saves and refuses."""

from collections.abc import Iterator

import pytest
import torch
from ffn_samples import ACTIVATIONS, DIM, HIDDEN, METHODS, case_of, choices, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.config.model import Activation, Compute
from moe_train.ops.activation import inner_width
from moe_train.ops.expert_ffn import compute as door
from moe_train.ops.expert_ffn import expert_ffn_reference
from moe_train.ops.expert_ffn.compute import lay_out
from moe_train.ops.expert_ffn.function import saved_bytes
from moe_train.ops.expert_ffn.segments import exact_segments
from moe_train.ops.grouped_gemm import BatchedProducts, LoopProducts

BUSY = [[0, 1], [1, 2], [2, 0], [0, 3], [3, 3], [1, 0]]
IDLE = [[0, 2], [2, 0], [0, 3]]
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let torch fill fresh memory with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def dtype_of(method: Compute) -> torch.dtype:
    """Torch's product for groups knows no fp64."""
    return torch.float32 if method == "grouped_mm" else torch.float64


def assert_equal(
    rows: list[list[int]], held: int, method: Compute, activation: Activation = "swiglu", biased: bool = False
) -> None:
    dtype = dtype_of(method)
    found = case_of(rows, held, activation, biased, dtype, dtype).results(method)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(found, case_of(rows, held, activation, biased).results("reference"), strict=True):
        assert a.shape == b.shape
        assert ((a - b).abs() <= tolerance * max(1.0, b.abs().max() if b.numel() else 0.0)).all()


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill segments up in fp64 too, and end a block with nearly every expert."""
    monkeypatch.setattr(door, "BUILT_BY_SHAPE", (torch.float64,))
    monkeypatch.setattr(door, "BLOCK_ROWS", 40)


@settings(max_examples=60, deadline=None)
@given(choices(), st.sampled_from(METHODS), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans())
def test_any_choices(
    chosen: tuple[list[list[int]], int], method: Compute, activation: Activation, biased: bool, is_rounded: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if is_rounded:
            patch.setattr(door, "BUILT_BY_SHAPE", (torch.float64,))
            patch.setattr(door, "BLOCK_ROWS", 20)
        assert_equal(*chosen, method, activation, biased)


@EACH_METHOD
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("rounded")
def test_given_choices(method: Compute, activation: Activation, biased: bool) -> None:
    for rows in (BUSY, IDLE, [[3, 3]], [], [[2, 2], [2, 2]]):
        assert_equal(rows, 3, method, activation, biased)


@EACH_METHOD
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_bf16(method: Compute, master: torch.dtype) -> None:
    """Gradients have the dtype of what they belong to; errors are those of a few roundings."""
    case = case_of(BUSY, 3, "swiglu", True, torch.bfloat16, master, dim=16)
    exact = [t.double() for t in case_of(BUSY, 3, "swiglu", True, dim=16).results("reference")]
    for found, expected, leaf in zip(case.results(method), exact, [case.rows_RD, *case.leaves], strict=True):
        assert found.dtype == leaf.dtype
        assert (found.double() - expected).norm() <= 2.0**-6 * expected.norm()


def test_the_reference_is_the_sum_over_choices() -> None:
    """By hand, for one token: weight · (relu(x · up) · down) of each of its experts."""
    case = case_of([[1, 2]], 3, "relu")
    up_LDF, down_LFD = case.networks.up_LDF, case.networks.down_LFD
    expected_D = sum(
        case.weights_RK[0, k] * ((case.rows_RD[0] @ up_LDF[e]).relu() @ down_LFD[e]) for k, e in ((0, 1), (1, 2))
    )
    found_RD = expert_ffn_reference(case.rows_RD, case.experts_RK, case.weights_RK, case.networks)
    assert isinstance(expected_D, Tensor)
    assert torch.allclose(found_RD[0], expected_D, rtol=1e-13)


@EACH_METHOD
@pytest.mark.parametrize("frozen", range(6))
@pytest.mark.usefixtures("rounded")
def test_what_needs_no_gradient_changes_nothing(method: Compute, frozen: int) -> None:
    dtype = dtype_of(method)
    expected = case_of(BUSY, 3, biased=True, dtype=dtype, master=dtype).results(method)[1:]
    case = case_of(BUSY, 3, biased=True, dtype=dtype, master=dtype)
    case.leaves[frozen].requires_grad_(False)
    wanted = [i for i in range(6) if i != frozen]
    upstream_RD = random(len(BUSY), DIM, seed=9).to(dtype)
    found = torch.autograd.grad(case.run(method), [case.leaves[i] for i in wanted], upstream_RD)
    for gradient, i in zip(found, wanted, strict=True):
        assert torch.equal(gradient, expected[i])


@EACH_METHOD
def test_a_stride_zero_gradient(method: Compute) -> None:
    """What ``y.sum().backward()`` hands down is one number seen through strides of zero."""
    results, dtype = [], dtype_of(method)
    methods: tuple[Compute, ...] = (method, "reference")
    for each in methods:
        case = case_of(BUSY, 3, dtype=dtype, master=dtype)
        case.run(each).sum().backward()
        results.append([leaf.grad for leaf in case.leaves])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["loop", "bmm", "grouped_mm"])
def test_a_second_derivative_is_refused(method: Compute) -> None:
    dtype = dtype_of(method)
    case = case_of(BUSY, 3, dtype=dtype, master=dtype)
    (gradient,) = torch.autograd.grad(case.run(method).square().sum(), [case.rows_RD], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("rounded")
def test_an_undefined_token_spoils_only_its_experts() -> None:
    """Also where rows fill segments up, and where experts share a block."""
    case = case_of([[0], [0], [1], [2]], 3)
    with torch.no_grad():
        case.rows_RD[0] = torch.nan
    y_RD, _, weights_RK, up_LDF, down_LFD = case.results("loop")
    for healthy in (y_RD, weights_RK, up_LDF, down_LFD):
        assert healthy[1:].isfinite().all()
    assert not up_LDF[0].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_saves_what_the_formula_says(activation: Activation, is_rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_rounded:
        monkeypatch.setattr(door, "BUILT_BY_SHAPE", (torch.float64,))
    case = case_of(BUSY, 3, activation, biased=True)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        case.run("loop")
    for leaf in case.leaves:
        del kept[leaf.untyped_storage().data_ptr()]
    rows = 3 * door.round_up(3) if is_rounded else 9
    assert sum(kept.values()) == saved_bytes(rows, 9, len(BUSY), inner_width(activation, HIDDEN), itemsize=8)


def test_nothing_is_kept_aside() -> None:
    """A pass that is computed again drops saved tensors, but not what hangs on the function itself."""
    case = case_of(BUSY, 3)
    node = case.run("loop").grad_fn
    assert node is not None
    held = [value for value in vars(node).values() if isinstance(value, Tensor)]
    assert held == []
    how = node.how  # type: ignore[attr-defined]
    assert not any(isinstance(value, Tensor) for value in vars(how.products).values())


@pytest.mark.parametrize(
    ("compute", "device", "dtype", "expected"),
    [
        ("auto", "cpu", torch.bfloat16, "loop"),
        ("auto", "cpu", torch.float64, "loop"),
        ("auto", "meta", torch.bfloat16, "grouped_mm"),
        ("auto", "meta", torch.float32, "loop"),
        ("grouped_mm", "cpu", torch.float32, "grouped_mm"),
        ("grouped_mm", "cpu", torch.float64, "loop"),
        ("grouped_mm", "meta", torch.float32, "loop"),
        ("bmm", "meta", torch.bfloat16, "bmm"),
        ("reference", "cpu", torch.float32, "reference"),
    ],
)
def test_methods_by_device_and_dtype(compute: Compute, device: str, dtype: torch.dtype, expected: str) -> None:
    """The device meta stands for any that is no CPU."""
    assert door.choose(torch.empty(1, DIM, dtype=dtype, device=device), compute) == expected


@pytest.mark.parametrize(
    ("counts", "dtype", "by_load", "kind"),
    [
        ([64, 64, 60, 50], torch.bfloat16, True, BatchedProducts),
        ([64, 64, 60, 50], torch.bfloat16, False, LoopProducts),
        ([64, 64, 60, 50], torch.float32, True, LoopProducts),
        ([64, 10, 10, 10], torch.bfloat16, True, LoopProducts),
        ([400, 400, 400, 400], torch.bfloat16, True, LoopProducts),
        ([0, 0, 0, 0], torch.bfloat16, True, LoopProducts),
        ([64, 64, 64, 0], torch.bfloat16, True, LoopProducts),
    ],
)
def test_a_batch_where_padding_is_cheap(counts: list[int], dtype: torch.dtype, by_load: bool, kind: type) -> None:
    experts_RK = torch.repeat_interleave(torch.arange(4), torch.tensor(counts)).unsqueeze(1)
    segments = exact_segments(experts_RK, 4, len(experts_RK))
    rows_RD = torch.zeros(len(experts_RK), DIM, dtype=dtype)
    found, products = lay_out(segments, torch.tensor(counts), "loop", rows_RD, experts_RK.numel(), by_load)
    assert isinstance(products, kind)
    assert found.num_rows == sum(block.rows.stop - block.rows.start for block in products.blocks())
