"""Draws that belong to places: equal to the published generator, even, and independent of who asks for them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.ops.random import derive_seed, random_bits, random_bits_reference, signed, uniform

SEEDS = st.integers(0, 2**63 - 1)
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
}
"""First outputs of SplitMix64 by its seed."""


@pytest.mark.parametrize("seed", PUBLISHED)
def test_published_outputs(seed: int) -> None:
    found = random_bits(seed, torch.arange(4)).tolist()
    assert found == [signed(value) for value in PUBLISHED[seed]]
    assert [random_bits_reference(seed, n) for n in range(4)] == PUBLISHED[seed]


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 2**62), min_size=1, max_size=8))
def test_equals_python_integers(seed: int, counters: list[int]) -> None:
    found = random_bits(seed, torch.tensor(counters)).tolist()
    assert found == [signed(random_bits_reference(seed, n)) for n in counters]


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.permutations(range(12)))
def test_a_draw_does_not_depend_on_the_others(seed: int, order: list[int]) -> None:
    together = random_bits(seed, torch.arange(12))
    assert torch.equal(random_bits(seed, torch.tensor(order).view(3, 4)).flatten(), together[order])


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_uniform_is_the_upper_23_bits_and_a_half(seed: int, counters: list[int]) -> None:
    found = uniform(seed, torch.tensor(counters))
    expected = [((random_bits_reference(seed, n) >> 41) + 0.5) / 2**23 for n in counters]
    assert found.dtype == torch.float32
    assert found.tolist() == expected


def test_uniform_never_reaches_zero_or_one() -> None:
    """Logarithms and normal quantiles of it must be finite, in fp32 too."""
    for bits, expected in ((0, 0.5), (-1, 2**23 - 0.5)):
        upper = (torch.tensor([bits]) >> 41) & 0x7FFFFF
        number = upper.to(torch.float32).add(0.5).mul(2.0**-23)
        assert 0.0 < number.item() < 1.0
        assert number.item() == expected * 2.0**-23
    drawn = uniform(0, torch.arange(2**20))
    assert 0.0 < drawn.min() < 1e-5
    assert 1.0 - 1e-5 < drawn.max() < 1.0


def test_uniform_is_even() -> None:
    num = 2**20
    drawn = uniform(derive_seed(3), torch.arange(num)).double()
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * num))
    assert drawn.var().item() == pytest.approx(1 / 12, abs=4 / math.sqrt(180 * num))
    bins = torch.bincount((drawn * 64).long(), minlength=64)
    chi_square = ((bins - num / 64).square() / (num / 64)).sum().item()
    assert abs(chi_square - 63) < 4 * math.sqrt(2 * 63)


def test_streams_of_neighbouring_seeds_are_unrelated() -> None:
    """Steps, layers and purposes are numbers 0, 1, 2, ...: what follows from them must not be."""
    num = 2**16
    drawn = torch.stack(
        [uniform(derive_seed(0, step, layer), torch.arange(num)) for step in range(3) for layer in (0, 1)]
    )
    correlation = torch.corrcoef(drawn.double())
    assert (correlation - torch.eye(6, dtype=torch.float64)).abs().max().item() < 5 / math.sqrt(num)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 2**32))
def test_every_part_of_a_seed_changes_it(parts: list[int], which: int, difference: int) -> None:
    changed = list(parts)
    changed[which % len(parts)] += difference
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) != derive_seed(*changed)
    assert derive_seed(*parts) != derive_seed(*parts, 0)


def test_the_order_of_the_parts_matters() -> None:
    assert len({derive_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}) == 512


def test_no_two_places_draw_alike() -> None:
    drawn = random_bits(derive_seed(0, 0), torch.arange(2**18))
    assert drawn.unique().numel() == drawn.numel(), "SplitMix64 is a permutation of 64-bit numbers"
