"""Gradients in flat buffers, on one rank: views that stay views, the norm, and who is named when one is bad."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from layouts import Case
from torch import nn

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World, joined
from moe_train.parallel.gradients import GradientBuffers, flat_buffer

CASE = Case("top-2")


@pytest.fixture(scope="module")
def lone_mesh() -> Iterator[Mesh]:
    with joined(dist.HashStore(), world := World(0, 1, torch.device("cpu"), 30.0)):
        yield build_mesh(world, 1)


def test_every_gradient_is_a_view_of_its_buffer(lone_mesh: Mesh) -> None:
    model = CASE.whole_model()
    buffers = GradientBuffers(model, lone_mesh)
    buffers.dense.fill_(1.0)
    buffers.experts.fill_(2.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad == (2.0 if ".experts." in name else 1.0)).all(), name
    assert buffers.dense.numel() + buffers.experts.numel() == sum(p.numel() for p in model.parameters())
    buffers.zero()
    assert not any(p.grad is None or p.grad.any() for p in model.parameters())


def test_backward_adds_into_the_buffers(lone_mesh: Mesh) -> None:
    model, (tokens_BS, _) = CASE.whole_model(), CASE.batches()[0]
    buffers = GradientBuffers(model, lone_mesh)
    model(tokens_BS).logits_BSV.square().mean().backward()
    once = torch.cat([buffers.dense, buffers.experts])
    assert buffers.experts.any()
    assert buffers.dense.any()
    model(tokens_BS).logits_BSV.square().mean().backward()
    assert torch.allclose(torch.cat([buffers.dense, buffers.experts]), 2 * once, rtol=1e-12, atol=0)


def test_a_gradient_that_left_its_buffer_is_named(lone_mesh: Mesh) -> None:
    model = CASE.whole_model()
    buffers = GradientBuffers(model, lone_mesh)
    model.norm.weight.grad = None
    with pytest.raises(AssertionError, match=r"the gradient of norm\.weight has left its buffer"):
        buffers.reduce()


@pytest.mark.parametrize("bad", ["embedding_VD", "blocks.1.ffn.experts.down_LFD", "blocks.0.ffn.router.weight"])
def test_the_bad_parameter_is_named(lone_mesh: Mesh, bad: str) -> None:
    model = CASE.whole_model()
    buffers = GradientBuffers(model, lone_mesh)
    assert buffers.first_nonfinite() == ""
    gradient = dict(model.named_parameters())[bad].grad
    assert gradient is not None
    gradient.view(-1)[-1] = float("inf")
    assert buffers.first_nonfinite() == bad
    assert not buffers.norm().isfinite()


def test_norm_and_scale(lone_mesh: Mesh) -> None:
    buffers = GradientBuffers(CASE.whole_model().float(), lone_mesh)
    buffers.dense.normal_()
    buffers.experts.normal_()
    everything = torch.cat([buffers.dense, buffers.experts]).double()
    norm = buffers.norm()
    assert norm.dtype == torch.float64
    assert torch.allclose(norm, everything.norm(), rtol=1e-12)
    buffers.scale(torch.tensor(0.25, dtype=torch.float64))
    assert torch.equal(torch.cat([buffers.dense, buffers.experts]).double(), everything * 0.25)


def test_a_dense_model_has_no_expert_buffer(lone_mesh: Mesh) -> None:
    model = Case("dense", ("model=dense_tiny", "model.ffn.num_experts=0")).whole_model()
    buffers = GradientBuffers(model, lone_mesh)
    assert buffers.experts.numel() == 0
    buffers.dense.fill_(1.0)
    buffers.reduce()
    assert buffers.norm().item() == pytest.approx(buffers.dense.numel() ** 0.5)


def test_one_buffer_has_one_dtype() -> None:
    mixed = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    with pytest.raises(AssertionError, match="cannot share a buffer"):
        flat_buffer(mixed, torch.device("cpu"))
