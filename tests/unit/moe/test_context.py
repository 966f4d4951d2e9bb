"""The context of routing: draws belong to tokens, by their place in the global batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_train.moe.context import Purpose, RoutingContext
from moe_train.ops.random import derive_seed, random_bits_reference, signed

BATCH, LENGTH = 6, 5


def context_of(sequences: list[int], seed: int = 11) -> RoutingContext:
    ids_BS = torch.zeros(len(sequences), LENGTH, dtype=torch.int64)
    return RoutingContext(ids_BS, torch.tensor(sequences, dtype=torch.int64), seed=seed)


def all_draws(context: RoutingContext) -> list[Tensor]:
    """Draws of every purpose, one row per sequence."""
    rows = len(context.sequences_B)
    drawn = [context.uniform(purpose, 3).view(rows, -1) for purpose in Purpose]
    drawn += [context.bits(purpose, 2).view(rows, -1) for purpose in Purpose]
    return drawn + [context.uniform_per_sequence(purpose).view(rows, 1) for purpose in Purpose]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(BATCH)), st.integers(1, BATCH - 1))
def test_draws_are_equal_for_whatever_ranks_hold_the_tokens(order: list[int], cut: int) -> None:
    whole = all_draws(context_of(list(range(BATCH))))
    parts = [all_draws(context_of(part)) for part in (order[:cut], order[cut:])]
    for first, second, expected in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat([first, second]), expected[order])


def test_draws_follow_the_formula() -> None:
    found = context_of([4, 2]).bits(Purpose.NOISE, 3)
    seed = derive_seed(11, Purpose.NOISE)
    places = [sequence * LENGTH + position for sequence in (4, 2) for position in range(LENGTH)]
    assert found.tolist() == [
        [signed(random_bits_reference(seed, place * 3 + j)) for j in range(3)] for place in places
    ]
    per_sequence = context_of([4, 2]).uniform_per_sequence(Purpose.EXEMPTION)
    bits = [random_bits_reference(derive_seed(11, Purpose.EXEMPTION), sequence) >> 41 for sequence in (4, 2)]
    assert per_sequence.tolist() == [(number + 0.5) * 2.0**-23 for number in bits]


def test_purposes_layers_and_steps_draw_numbers_of_their_own() -> None:
    contexts = [context_of([0, 1], seed).at_layer(depth) for seed in (0, 1) for depth in (0, 1)]
    drawn = torch.cat([context.bits(purpose, 2).flatten() for context in contexts for purpose in Purpose])
    assert drawn.unique().numel() == drawn.numel() == 4 * len(Purpose) * 2 * LENGTH * 2


def test_a_layer_changes_the_seed_only() -> None:
    context = context_of([3])
    at_layer = context.at_layer(2)
    assert at_layer.seed == derive_seed(11, 2)
    for name in ("ids_BS", "sequences_B", "valid_BS", "peers"):
        assert getattr(at_layer, name) is getattr(context, name), name


def test_recomputation_draws_the_same() -> None:
    context = context_of([0, 1])
    torch.manual_seed(0)
    first = all_draws(context)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, all_draws(context), strict=True))


@pytest.mark.parametrize("is_padded", [False, True])
def test_valid_tokens(is_padded: bool) -> None:
    valid_BS = torch.arange(LENGTH) < torch.tensor([[2], [0]])
    context = RoutingContext.of(torch.zeros(2, LENGTH, dtype=torch.int64), valid_BS if is_padded else None)
    assert context.num_tokens == 2 * LENGTH
    assert context.length == LENGTH
    assert context.valid_T.tolist() == (valid_BS.flatten().tolist() if is_padded else [True] * 2 * LENGTH)
    assert context.places_T.tolist() == list(range(2 * LENGTH))
