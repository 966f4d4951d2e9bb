"""Memory of a text: nothing of it is lost or changed, it is as small as it says, and moves seldom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import LATENT, LENGTH, build, config_of, random, random_tokens
from torch import Tensor

from moe_train.models.attention import GroupedQueryAttention, LatentAttention, build_attention, rotary_width
from moe_train.models.memory import LEAST_ROOM, Memory, TextMemory
from moe_train.ops.rotary import rotary_table

QUICK = settings(max_examples=80, deadline=None)


@QUICK
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.one_of(st.none(), st.integers(1, 12)))
def test_what_is_remembered_is_the_text_as_far_as_it_is_seen(nums: list[int], window: int | None) -> None:
    """After any pieces, also of no token: all of it, or what the window of the first new token holds."""
    keys, values = random(2, 3, sum(nums), 4, seed=0), random(2, 1, sum(nums), 5, seed=1)
    memory, end = Memory(), 0
    for num in nums:
        first = 0 if window is None else max(0, end - (window - 1))
        seen = memory.extend(keys[:, :, end : end + num], values[:, :, end : end + num], window=window)
        end += num
        assert torch.equal(seen[0], keys[:, :, first:end])
        assert torch.equal(seen[1], values[:, :, first:end])
        if num > 0:  # after no token the one is missing that a new one would not see
            assert memory.length == (end if window is None else min(window, end))
        room = max(LEAST_ROOM, 2 * (end if window is None else window))
        assert memory.num_bytes <= room * 2 * (3 * 4 + 5) * 8


@pytest.mark.parametrize(("window", "positions"), [(None, 1150), (100, 200), (1, LEAST_ROOM)])
def test_tokens_are_moved_only_when_the_room_is_used_up(window: int | None, positions: int) -> None:
    """Not once per token: a thousand of them find new room seven times, or once per window (or least room)."""
    memory, place, moves = Memory(), 0, 0
    for token in torch.arange(1000.0).view(-1, 1, 1, 1, 1):
        (seen,) = memory.extend(token, window=window)
        moves += seen.untyped_storage().data_ptr() != place
        place = seen.untyped_storage().data_ptr()
        assert seen[0, 0, -1] == token
    assert memory.num_bytes == 4 * positions
    assert moves <= {None: 7, 100: 4 + 10, 1: 1000 // LEAST_ROOM + 1}[window]


def test_a_long_prompt_leaves_no_more_than_the_window() -> None:
    memory = Memory()
    (seen,) = memory.extend(torch.arange(5000.0).view(1, 1, -1, 1), window=50)
    assert seen.shape[2] == 5000, "the prompt's own tokens see each other"
    assert memory.length == 50
    assert memory.num_bytes == 4 * 100
    assert memory.extend(torch.zeros(1, 1, 1, 1), window=50)[0].flatten().tolist() == [*range(4951, 5000), 0]


def test_nothing_in_it_has_a_gradient() -> None:
    memory = Memory()
    for _ in range(2):
        (seen,) = memory.extend(torch.ones(1, 1, 3, 2, requires_grad=True))
        assert not seen.requires_grad


def test_no_text_no_bytes() -> None:
    memory = TextMemory(3)
    assert (memory.length, memory.num_bytes, [block.length for block in memory.blocks]) == (0, 0, [0, 0, 0])


KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "two key heads of width 6": (("model.attention.kv_heads=2", "model.attention.head_dim=6"), 2 * 2 * 6),
    "a key head for each query head": (("model.attention.kv_heads=4", "model.attention.qk_norm=full"), 2 * 16),
    "latent": (("model.attention.kind=mla", *LATENT), 6 + 4),
    "latent, compressed queries, more heads": (
        ("model.attention.kind=mla", *LATENT, "model.attention.q_rank=5", "model.heads=8"), 6 + 4
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "numbers"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(("precision", "number_bytes"), [("fp32", 4), ("bf16", 2)])
def test_bytes_per_token_and_block(overrides: tuple[str, ...], numbers: int, precision: str, number_bytes: int) -> None:
    """Of the activations' dtype, though weights are fp32."""
    model = build(config_of(*overrides), precision).eval()
    memory = TextMemory(len(model.blocks))
    with torch.no_grad():
        model(random_tokens(1, 40), memory=memory)
    assert memory.length == 40
    assert all(block.length == 40 for block in memory.blocks)
    assert memory.num_bytes == len(model.blocks) * 2 * 40 * numbers * number_bytes, "with room for twice the text"


def test_a_window_keeps_its_positions_and_full_layers_keep_all() -> None:
    model = build(config_of("model.attention.window=3", "model.attention.full_every=2", "model.layers=4")).eval()
    memory = TextMemory(4)
    with torch.no_grad():
        for tokens_BS in random_tokens(2, 30).split((20, 1, 1, 7, 1), dim=1):
            model(tokens_BS, memory=memory)
            assert [block.length for block in memory.blocks] == [3, memory.length] * 2
    assert memory.blocks[0].num_bytes < memory.blocks[1].num_bytes


PIECES = ((8,), (1,) * 8, (5, 1, 1, 1), (3, 4, 1), (1, 5, 2))
ATTENTIONS = {
    "grouped": ("model.attention.kind=gqa",),
    "window, sinks": ("model.attention.window=3", "model.attention.sinks=true"),
    "window of one": ("model.attention.window=1",),
    "products": ("model.attention.compute=products",),
    "latent": ("model.attention.kind=mla", *LATENT),
    "latent, YaRN": (
        "model.attention.kind=mla", *LATENT, "model.attention.q_rank=5", "model.attention.yarn.factor=8.0",
        "model.attention.yarn.original_length=16", "model.attention.yarn.mscale_all_dim=0.7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides", ATTENTIONS.values(), ids=ATTENTIONS.keys())
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_attention_by_pieces_is_that_of_the_whole(overrides: tuple[str, ...], pieces: tuple[int, ...]) -> None:
    config = config_of(*overrides)
    attention, x_BSD = attention_of(config), random(2, LENGTH, config.dim)
    rotary = rotary_table(LENGTH, rotary_width(config), config.attention, torch.float64, x_BSD.device)
    expected_BSD, memory, parts, first = attention(x_BSD, rotary), Memory(), [], 0
    for num in pieces:
        at_BC = torch.arange(first, first + num).expand(2, -1)
        parts.append(attention(x_BSD[:, first : first + num], rotary.at(at_BC), memory))
        first += num
    assert torch.allclose(torch.cat(parts, dim=1), expected_BSD, rtol=0, atol=1e-12)
    assert expected_BSD.abs().max() > 1e-2


def attention_of(config: Any) -> GroupedQueryAttention | LatentAttention:
    """With normal numbers of 0.3, sinks included."""
    attention = build_attention(config, 0, 1.0).double()
    for place, parameter in enumerate(attention.parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=place)
    return attention


@pytest.mark.parametrize("overrides", [ATTENTIONS["grouped"], ATTENTIONS["latent, YaRN"]], ids=["plain", "YaRN"])
def test_later_positions_are_rotated_as_in_a_longer_table(overrides: tuple[str, ...]) -> None:
    """A token alone needs no table of all before it."""
    config, first = config_of(*overrides), 1000
    keys = (rotary_width(config), config.attention, torch.float64, torch.device("cpu"))
    whole, found = rotary_table(first + 3, *keys).since(first), rotary_table(3, *keys, first)
    assert found.cos_SW.shape == (3, rotary_width(config) // 2)
    assert torch.allclose(found.cos_SW, whole.cos_SW, rtol=0, atol=1e-14)
    assert torch.allclose(found.sin_SW, whole.sin_SW, rtol=0, atol=1e-14)


def test_latent_attention_makes_no_keys_of_earlier_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes the up-projection is the beginning of the text, never what is remembered."""
    config = config_of(*ATTENTIONS["latent"])
    attention, rows = attention_of(config), []
    attention.kv_up.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    rotary = rotary_table(LENGTH, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))
    memory = Memory()
    for first, num in ((0, 5), (5, 1), (6, 2)):
        piece: Tensor = random(1, num, config.dim, seed=first)
        attention(piece, rotary.at(torch.arange(first, first + num).unsqueeze(0)), memory)
    assert rows == [5]
