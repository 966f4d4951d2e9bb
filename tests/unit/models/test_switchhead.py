"""SwitchHead against a loop over tokens, against dense attention, and what its routers see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import filled, random
from torch import Tensor

from moe_train.config.attention import GroupedQueryConfig, SwitchHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.models.attention import GroupedQueryAttention
from moe_train.models.memory import Memory
from moe_train.models.switchhead import SwitchHead
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.routing import Routing
from moe_train.ops.rotary import Rotary, rotary_table

BATCH, LENGTH, DIM, HEADS, WIDTH, EXPERTS = 2, 7, 10, 3, 4, 4


def built(**keys: object) -> SwitchHead:
    """In evaluation, in fp64, with values none of which is like another."""
    attention = SwitchHeadConfig(head_dim=WIDTH, experts=EXPERTS, **keys)
    config = ModelConfig(dim=DIM, heads=HEADS, attention=attention)
    return filled(SwitchHead(config, attention, 1.0, LocalExchange(1)).double()).eval()


def rotations(length: int = LENGTH) -> Rotary:
    return rotary_table(length, WIDTH, SwitchHeadConfig(), torch.float64, torch.device("cpu"))


def tokens(seed: int = 9) -> Tensor:
    return random(BATCH, LENGTH, DIM, seed=seed)


def context(valid_BS: Tensor | None = None) -> RoutingContext:
    return RoutingContext.of(torch.zeros(BATCH, LENGTH, dtype=torch.int64), valid_BS)


def run(attention: SwitchHead, x_BSD: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    y_BSD: Tensor = attention(x_BSD, rotations(x_BSD.shape[1]), context(valid_BS)).y_BSD
    return y_BSD


def routings(attention: SwitchHead, x_BSD: Tensor) -> dict[str, Routing]:
    """What the routers of both sides decide."""
    found: dict[str, Routing] = {}
    handles = [
        layer.router.register_forward_hook(lambda module, inputs, routing, name=name: found.update({name: routing}))
        for name, layer in attention.expert_layers.items()
    ]
    run(attention, x_BSD)
    for handle in handles:
        handle.remove()
    return found


def turned(x_W: Tensor, position: int) -> Tensor:
    half = len(x_W) // 2
    angles = torch.tensor([position * 10_000.0 ** (-2 * i / len(x_W)) for i in range(half)], dtype=x_W.dtype)
    first, second = x_W[:half], x_W[half:]
    return torch.cat([
        first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()
    ])  # fmt: skip


def by_loops(attention: SwitchHead, x_BSD: Tensor, top_k: int, scale: float) -> Tensor:
    """The formulas of section 2.2 of the paper, for one token, head and expert at a time."""
    w = dict(attention.named_parameters())

    def chosen(side: str, x_D: Tensor, h: int) -> list[tuple[int, Tensor]]:
        rows = range(h * EXPERTS, (h + 1) * EXPERTS)
        scores = {e: torch.sigmoid(w[f"{side}.router.weight"][e] @ x_D) for e in rows}
        return [(e, scale * scores[e]) for e in sorted(rows, key=lambda e: -scores[e].item())[:top_k]]

    sequences = []
    for x_SD in x_BSD:
        made = []
        for t in range(len(x_SD)):
            y_D = torch.zeros(DIM, dtype=x_SD.dtype)
            for h in range(HEADS):
                q_rows = slice(h * WIDTH, (h + 1) * WIDTH)
                k_rows = slice((HEADS + h) * WIDTH, (HEADS + h + 1) * WIDTH)
                q_W = turned(w["qk.weight"][q_rows] @ x_SD[t], t)
                scores, values = [], []
                for s in range(t + 1):
                    scores.append(q_W @ turned(w["qk.weight"][k_rows] @ x_SD[s], s) / math.sqrt(WIDTH))
                    parts = [g * (x_SD[s] @ w["values.experts.weight_LNM"][e]) for e, g in chosen("values", x_SD[s], h)]
                    values.append(torch.stack(parts).sum(0))
                seen_W = torch.stack(scores).softmax(0) @ torch.stack(values)
                for e, g in chosen("outputs", x_SD[t], h):
                    y_D = y_D + g * (seen_W @ w["outputs.experts.weight_LNM"][e])
            made.append(y_D)
        sequences.append(torch.stack(made))
    return torch.stack(sequences)


@pytest.mark.parametrize(("top_k", "scale"), [(1, 1.0), (2, 1.7), (EXPERTS, 1.0)])
def test_values_and_gradients_are_those_of_the_loop(top_k: int, scale: float) -> None:
    attention, upstream = built(top_k=top_k, scale=scale), tokens(seed=4)
    x_BSD = tokens().requires_grad_()
    expected, found = by_loops(attention, x_BSD, top_k, scale), run(attention, x_BSD)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x_BSD, *attention.parameters()]
    pairs = zip(*(torch.autograd.grad(y_BSD, leaves, upstream) for y_BSD in (found, expected)), strict=True)
    for a, b in pairs:
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1.0)


@torch.no_grad()
def test_with_all_experts_and_gates_of_one_it_is_dense_attention_of_the_summed_weights() -> None:
    """A router of zeros gives each expert 1/2, and a scale of 2 makes that one."""
    attention = built(top_k=EXPERTS, scale=2.0)
    for layer in attention.expert_layers.values():
        layer.router.get_parameter("weight").zero_()
    config = ModelConfig(dim=DIM, heads=HEADS, attention=GroupedQueryConfig(head_dim=WIDTH))
    dense = GroupedQueryAttention(config, GroupedQueryConfig(head_dim=WIDTH), None, 1.0).double()
    w = dict(attention.named_parameters())
    values_HDW = w["values.experts.weight_LNM"].view(HEADS, EXPERTS, DIM, WIDTH).sum(1)
    outputs_HWD = w["outputs.experts.weight_LNM"].view(HEADS, EXPERTS, WIDTH, DIM).sum(1)
    dense.qkv.weight.copy_(torch.cat([w["qk.weight"], values_HDW.transpose(1, 2).flatten(0, 1)]))
    dense.out.weight.copy_(outputs_HWD.flatten(0, 1).t())
    torch.testing.assert_close(run(attention, tokens()), dense(tokens(), rotations()), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(EXPERTS)), st.integers(0, HEADS - 1), st.sampled_from(["values", "outputs"]))
def test_the_order_of_a_heads_experts_means_nothing(order: list[int], head: int, side: str) -> None:
    attention = built(top_k=2)
    before, w = run(attention, tokens()), dict(attention.named_parameters())
    places = list(range(HEADS * EXPERTS))
    places[head * EXPERTS : (head + 1) * EXPERTS] = [head * EXPERTS + e for e in order]
    with torch.no_grad():
        for name in ("router.weight", "experts.weight_LNM"):
            w[f"{side}.{name}"].copy_(w[f"{side}.{name}"][places].clone())
    torch.testing.assert_close(run(attention, tokens()), before, rtol=1e-12, atol=1e-12)


def test_the_order_matters_to_whom_the_router_does_not_follow() -> None:
    """The counterpart, without which the test above could not fail."""
    attention = built(top_k=2)
    before, weight = run(attention, tokens()), attention.values.experts.get_parameter("weight_LNM")
    with torch.no_grad():
        weight.copy_(weight.flip(0).clone())
    assert (run(attention, tokens()) - before).abs().max() > 1e-3


def test_values_are_routed_by_the_source_and_outputs_by_the_destination() -> None:
    """Another token at one place: elsewhere nobody is routed otherwise, though others see other values there."""
    attention, place = built(top_k=2), 3
    x_BSD, other_BSD = tokens(), tokens()
    other_BSD[:, place] = tokens(seed=5)[:, place]
    before, after = routings(attention, x_BSD), routings(attention, other_BSD)
    elsewhere = [s for s in range(LENGTH) if s != place]
    for side in ("values", "outputs"):
        a, b = (found[side].logits_TE.view(BATCH, LENGTH, -1) for found in (before, after))
        assert torch.equal(a[:, elsewhere], b[:, elsewhere]), side
        assert (a[:, place] - b[:, place]).abs().min() > 0
    moved = (run(attention, x_BSD) - run(attention, other_BSD)).abs().amax(dim=(0, 2))
    assert (moved[place:] > 1e-6).all(), "later tokens see the other value"


@torch.no_grad()
def test_each_side_obeys_its_own_router_only() -> None:
    """What a router of values changes reaches later tokens too; what one of outputs changes, its own token alone."""
    for side, reaches in (("values", LENGTH), ("outputs", 1)):
        attention, x_BSD = built(top_k=1), torch.zeros(BATCH, LENGTH, DIM, dtype=torch.float64)
        x_BSD[:, :, 1:] = tokens()[:, :, 1:]
        x_BSD[:, 2, 0] = 1.0  # the only token whose routing the first channel can change
        before = run(attention, x_BSD)
        attention.expert_layers[side].router.get_parameter("weight")[0, 0] += 50.0
        moved = (run(attention, x_BSD) - before).abs().amax(dim=(0, 2)) > 1e-9
        assert moved.tolist() == [2 <= s < 2 + reaches for s in range(LENGTH)], side


@torch.no_grad()
def test_a_token_sees_no_later_one() -> None:
    attention, x_BSD = built(top_k=2), tokens()
    for place in range(LENGTH):
        other_BSD = x_BSD.clone()
        other_BSD[:, place] += 1.0
        moved = (run(attention, x_BSD) - run(attention, other_BSD)).abs().amax(dim=(0, 2))
        assert (moved[:place] == 0).all()
        assert (moved[place:] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * LENGTH, [4, 1, 2], [LENGTH]])
def test_with_a_memory_it_goes_on_where_it_was(steps: list[int]) -> None:
    attention, x_BSD, memory, first, made = built(top_k=2), tokens(), Memory(), 0, []
    for step in steps:
        rotary = rotations(first + step).since(first)
        part = RoutingContext.of(torch.zeros(BATCH, step, dtype=torch.int64))
        made.append(attention(x_BSD[:, first : first + step], rotary, part, memory).y_BSD)
        first += step
    torch.testing.assert_close(torch.cat(made, dim=1), run(attention, x_BSD), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_padding_gets_nothing_and_changes_nothing_before_it() -> None:
    attention, x_BSD = built(top_k=2), tokens()
    valid_BS = torch.arange(LENGTH) < torch.tensor([[4], [LENGTH]])
    found = attention(x_BSD, rotations(), context(valid_BS))
    whole = run(attention, x_BSD)
    assert (found.y_BSD[~valid_BS] == 0).all()
    torch.testing.assert_close(found.y_BSD[valid_BS], whole[valid_BS], rtol=1e-12, atol=1e-12)
    for record in found.records:
        assert int(record.tokens) == 4 + LENGTH
        assert int(record.counts_E.sum()) == (4 + LENGTH) * HEADS * 2
        assert record.counts_E.view(HEADS, EXPERTS).sum(dim=1).unique().numel() == 1, "each head takes as many"


def test_dropout_of_experts_decides_and_weighs_nothing() -> None:
    attention = built(top_k=2, expert_dropout=0.5).train()
    found, calm = routings(attention, tokens()), routings(attention.eval(), tokens())
    for side, routing in found.items():
        scores_TE = routing.logits_TE.sigmoid()
        assert torch.equal(routing.weights_TK, scores_TE.gather(1, routing.experts_TK)), "the weights are the scores"
        changed = (routing.experts_TK.sort(dim=1).values != calm[side].experts_TK.sort(dim=1).values).any(dim=1)
        assert 0.3 < changed.double().mean() <= 1.0
        hidden = routing.ranking_TE.isinf()
        assert 0.35 < hidden.double().mean() < 0.65
    assert not torch.equal(found["values"].ranking_TE.isinf(), found["outputs"].ranking_TE.isinf()), "own draws"
    assert not any(routing.ranking_TE.isinf().any() for routing in calm.values())


def test_the_choices_of_a_token_stand_in_order_of_heads_and_shares_sum_to_one() -> None:
    for routing in routings(built(top_k=2), tokens()).values():
        heads_TK = routing.experts_TK // EXPERTS
        assert torch.equal(heads_TK, torch.arange(HEADS).repeat_interleave(2).expand_as(heads_TK))
        torch.testing.assert_close(routing.probabilities_TE.sum(dim=1), torch.ones(BATCH * LENGTH).double())
