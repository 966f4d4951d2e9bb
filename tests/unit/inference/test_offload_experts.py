"""Experts that come one after the other give, bit for bit, what they give together in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_train.config.model import Activation, Compute
from moe_train.inference.offload.cache import Buffers, Cache
from moe_train.inference.offload.experts import OffloadedExperts
from moe_train.moe.exchange.journey import Arrived
from moe_train.moe.experts import Experts

DIM, HIDDEN, HELD = 24, 32, 5


def pair(activation: Activation, biased: bool, compute: Compute, dtype: torch.dtype, cached: int, hidden: int = HIDDEN):
    """The same experts in memory, in fp32 unless they compute in fp64, and from a cache, in the dtype of the rows."""
    experts = Experts(DIM, hidden, range(HELD), 1.0, 1.0, activation, biased, compute)
    experts.to(torch.promote_types(dtype, torch.float32))
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=generator)

    def load(place: int, into: Sequence[Tensor]) -> None:
        for target, parameter in zip(into, experts.parameters(), strict=True):
            target.copy_(parameter[place])

    buffers = Buffers(lambda: [torch.empty(p.shape[1:], dtype=dtype) for p in experts.parameters()])
    cache = Cache(cached, HELD, load, buffers, expert_bytes=1)
    return experts, OffloadedExperts(cache, HELD, activation, compute)


def arrived(num_rows: int, choices: int, dtype: torch.dtype, seed: int, highest: int = HELD) -> Arrived:
    """Rows with experts drawn below ``highest``; HELD is none."""
    generator = torch.Generator().manual_seed(seed)
    scores_RE = torch.rand(num_rows, highest + 1, generator=generator)
    experts_RK = scores_RE.topk(choices).indices
    experts_RK = torch.where(experts_RK == highest, HELD, experts_RK)
    rows_RD = torch.randn(num_rows, DIM, generator=generator).to(dtype)
    weights_RK = torch.rand(num_rows, choices, generator=generator)
    return Arrived(rows_RD, experts_RK, weights_RK, int((experts_RK < HELD).sum()), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compute", ["auto", "loop", "bmm", "grouped_mm"])
@pytest.mark.parametrize(("activation", "biased"), [("swiglu", False), ("gelu", True), ("swiglu_clamped", True)])
def test_all_methods_and_formats_equal_those_in_memory(dtype, compute, activation, biased) -> None:
    for cached in (1, 3, HELD):
        experts, offloaded = pair(activation, biased, compute, dtype, cached)
        for seed, num_rows in enumerate([1, 2, 7, 33, 400, 1]):
            rows = arrived(num_rows, 2, dtype, seed)
            with torch.no_grad():
                truth_RD = experts(rows)
            assert truth_RD.abs().sum() > 0 or rows.num_assignments == 0
            assert torch.equal(offloaded(rows), truth_RD), (cached, num_rows)
        assert offloaded.cache.buffers.made <= cached + 1


def test_even_loads_in_bf16_are_padded_as_in_memory() -> None:
    """Where all experts have about as many rows, the method by itself makes one batch of them."""
    experts, offloaded = pair("swiglu", False, "auto", torch.bfloat16, 2)
    rows_RD = torch.randn(10 * HELD, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    experts_R1 = torch.arange(10 * HELD).remainder(HELD).unsqueeze(1)
    rows = Arrived(rows_RD, experts_R1, torch.ones(10 * HELD, 1), 10 * HELD, None)
    with torch.no_grad():
        assert torch.equal(offloaded(rows), experts(rows))


@pytest.mark.parametrize("compute", ["loop", "bmm"])
def test_odd_widths_are_equal_but_for_the_last_place(compute: Compute) -> None:
    """Torch's activations compute what does not fill a register of the processor by other code."""
    experts, offloaded = pair("swiglu_clamped", True, compute, torch.float32, 2, hidden=20)
    for num_rows in (1, 9, 50):
        rows = arrived(num_rows, 2, torch.float32, num_rows)
        with torch.no_grad():
            truth_RD = experts(rows)
        assert (offloaded(rows) - truth_RD).abs().max() <= 1e-6 * truth_RD.abs().max()


def test_no_rows_and_rows_without_experts_are_zeros() -> None:
    _, offloaded = pair("swiglu", False, "auto", torch.float32, 2)
    none = Arrived(torch.ones(3, DIM), torch.full((3, 2), HELD), torch.ones(3, 2), 0, None)
    assert torch.equal(offloaded(none), torch.zeros(3, DIM))
    assert offloaded(arrived(0, 2, torch.float32, 0)).shape == (0, DIM)
    assert offloaded.cache.traffic.misses == 0


def test_the_reference_method_is_the_loop() -> None:
    experts, offloaded = pair("swiglu", True, "reference", torch.float32, 2)
    rows = arrived(40, 2, torch.float32, 3)
    with torch.no_grad():
        assert torch.allclose(offloaded(rows), experts(rows), rtol=1e-4, atol=1e-4)
