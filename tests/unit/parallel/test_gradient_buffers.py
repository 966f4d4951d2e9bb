"""Gradients of whole parameters, on one rank: views that stay views, the norm, and who is named when one is bad."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case
from torch import Tensor, nn

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.parallel.gradients import ROW, OwnGradients, SummedGradients, WholeGradients, flat_buffer, squared_norm

CASE = Case("top-2")


@pytest.fixture(scope="module")
def lone_mesh() -> Iterator[Mesh]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)


def passed(model: nn.Module, tokens_BS: Tensor) -> None:
    """A backward pass."""
    torch.autograd.backward(model(tokens_BS).logits_BSV.square().mean())


def test_every_gradient_is_a_view_of_the_buffer(lone_mesh: Mesh) -> None:
    model = CASE.whole_model()
    summed = SummedGradients(dict(model.named_parameters()), lone_mesh.world)
    summed.buffer.fill_(1.0)
    assert all(p.grad is not None and (p.grad == 1.0).all() for p in model.parameters())
    assert summed.buffer.numel() == sum(p.numel() for p in model.parameters())
    summed.zero()
    summed.reduce()
    assert not any(p.grad is None or p.grad.any() for p in model.parameters()), "what no loss reached"
    assert not summed.buffer.any()


@pytest.mark.parametrize("kind", ["own", "summed"])
def test_passes_of_a_step_add_up_and_a_step_starts_anew(lone_mesh: Mesh, kind: str) -> None:
    model, (tokens_BS, _) = CASE.whole_model(), CASE.batches()[0]
    parameters = dict(model.named_parameters())
    part = OwnGradients(parameters) if kind == "own" else SummedGradients(parameters, lone_mesh.world)
    expected = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for rows in (tokens_BS[:2], tokens_BS[2:4]):
        found = torch.autograd.grad(model(rows).logits_BSV.square().mean(), list(parameters.values()))
        for gradient, sum_of_passes in zip(found, expected.values(), strict=True):
            sum_of_passes += gradient
    assert any(gradient.any() for gradient in expected.values())
    for _ in range(2):
        part.zero()
        passed(model, tokens_BS[:2])
        passed(model, tokens_BS[2:4])
        part.reduce()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-12, atol=1e-18), name
        assert sum(t.numel() for t in part.gradients()) == sum(p.numel() for p in parameters.values())
    flat = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert torch.allclose(torch.cat([t.flatten() for t in part.gradients()]), flat, rtol=1e-12, atol=1e-18)


def test_a_process_alone_has_no_buffers(lone_mesh: Mesh) -> None:
    """What autograd made is the gradient: not copied, not added to zeros."""
    model, (tokens_BS, _) = CASE.whole_model(), CASE.batches()[0]
    gradients = WholeGradients(model, lone_mesh)
    assert isinstance(gradients.dense, OwnGradients)
    assert isinstance(gradients.experts, OwnGradients)
    gradients.zero()
    assert all(p.grad is None for p in model.parameters())
    passed(model, tokens_BS)
    made = {p.grad.data_ptr() for p in model.parameters() if p.grad is not None}
    gradients.reduce()
    assert {p.grad.data_ptr() for p in model.parameters() if p.grad is not None} == made


def test_a_gradient_that_left_its_buffer_is_named(lone_mesh: Mesh) -> None:
    model = CASE.whole_model()
    summed = SummedGradients(dict(model.named_parameters()), lone_mesh.world)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    with pytest.raises(AssertionError, match=r"the gradient of norm\.weight has left its buffer"):
        summed.reduce()


@pytest.mark.parametrize("bad", ["embedding_VD", "blocks.1.ffn.experts.down_LFD", "blocks.0.ffn.router.weight"])
def test_the_bad_parameter_is_named(lone_mesh: Mesh, bad: str) -> None:
    model = CASE.whole_model()
    gradients = WholeGradients(model, lone_mesh)
    gradients.reduce()
    assert gradients.first_nonfinite() == ""
    gradient = dict(model.named_parameters())[bad].grad
    assert gradient is not None
    gradient.view(-1)[-1] = float("inf")
    assert gradients.first_nonfinite() == bad
    assert not gradients.norm().isfinite()


def test_norm_and_scale(lone_mesh: Mesh) -> None:
    model = CASE.whole_model().float()
    gradients = WholeGradients(model, lone_mesh)
    gradients.reduce()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.normal_()

    def everything() -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    before, norm = everything(), gradients.norm()
    assert norm.dtype == torch.float64
    assert torch.allclose(norm, before.norm(), rtol=1e-7)
    gradients.scale(torch.tensor(0.25, dtype=torch.float64))
    assert torch.equal(everything(), before * 0.25)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * ROW), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(-30, 30))
def test_the_sum_of_squares_of_any_size(size: int, dtype: torch.dtype, exponent: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) * 2.0**exponent
    found = squared_norm(x)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(x.double().square().sum().item(), rel=1e-12 if dtype.itemsize == 8 else 1e-6)


def test_the_sum_of_squares_of_many_values_stays_exact() -> None:
    """A plain fp32 sum of squares loses what is small beside it."""
    x = torch.full((2**24,), 0.5)
    assert squared_norm(x).item() == pytest.approx(2.0**22, rel=1e-7)


def test_a_dense_model_has_no_experts(lone_mesh: Mesh) -> None:
    model = Case("dense", ("model=dense_tiny", "model.ffn.num_experts=0")).whole_model()
    gradients = WholeGradients(model, lone_mesh)
    gradients.zero()
    gradients.reduce()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(1.0)
    assert list(gradients.experts.gradients()) == []
    assert gradients.norm().item() == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5)


def test_one_buffer_has_one_dtype() -> None:
    mixed = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    with pytest.raises(AssertionError, match="cannot share a buffer"):
        flat_buffer(mixed)
