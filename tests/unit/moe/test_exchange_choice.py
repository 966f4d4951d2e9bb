"""Which exchange a layout gets, and the arithmetic behind it."""

from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from moe_train.config.schema import LayoutConfig
from moe_train.dist.mesh import Layout
from moe_train.dist.world import World, joined
from moe_train.moe.exchange.choose import choice_for, choose, visited


@pytest.mark.parametrize(("places", "num_experts", "top_k"), [(2, 8, 1), (2, 8, 2), (4, 8, 3), (8, 8, 5), (4, 8, 8)])
def test_visited_counts_all_choices(places: int, num_experts: int, top_k: int) -> None:
    every = list(combinations(range(num_experts), top_k))
    first = [chosen for chosen in every if min(chosen) < num_experts // places]
    assert visited(places, num_experts, top_k) == pytest.approx(len(first) / len(every), abs=1e-12)


def kind_of(ep: int, node_size: int, num_experts: int, top_k: int, asked: str = "auto", padded: bool = False) -> str:
    config = LayoutConfig(ep=ep, exchange=asked)
    return choose(Layout(ep, ep), num_experts, top_k, config, padded, node_size).kind


@pytest.mark.parametrize(
    ("ep", "node_size", "num_experts", "top_k", "kind"),
    [
        (1, 8, 8, 2, "local"),
        (4, 8, 0, 1, "local"),  # a dense model
        (8, 8, 8, 2, "alltoall"),  # Mixtral in a node
        (2, 8, 64, 8, "allgather"),  # OLMoE: 1 of 400 tokens stays away from a rank
        (4, 8, 128, 8, "allgather"),  # Qwen3: 93 of 1000 do
        (4, 8, 128, 6, "alltoall"),  # 171 of 1000
        (16, 8, 256, 1, "alltoall"),  # one row per token either way
        (16, 8, 256, 8, "hierarchical"),
        (64, 8, 256, 8, "hierarchical"),  # DeepSeek-V3
        (12, 8, 24, 4, "alltoall"),  # nodes and groups do not fit
        (4, 1, 64, 8, "alltoall"),  # nodes of one rank
    ],
)
def test_auto(ep: int, node_size: int, num_experts: int, top_k: int, kind: str) -> None:
    assert kind_of(ep, node_size, num_experts, top_k) == kind


@pytest.mark.parametrize("asked", ["alltoall", "hierarchical", "allgather"])
def test_what_is_asked_for_is_taken_where_it_can_be(asked: str) -> None:
    assert kind_of(16, 8, 256, 8, asked) == asked
    assert kind_of(1, 8, 256, 8, asked) == "local"
    assert kind_of(16, 8, 256, 8, asked, padded=True) == "alltoall"
    inside = kind_of(8, 8, 256, 8, asked)
    assert inside == ("alltoall" if asked == "hierarchical" else asked)


def test_the_reason_is_told_with_its_numbers() -> None:
    choice = choose(Layout(64, 64), 256, 8, LayoutConfig(ep=64), False, 8)
    # 56 ranks elsewhere, each visited by 1 - C(252, 8) / C(256, 8) = 0.1199; 7 nodes, each by 0.6618.
    assert choice.reason == "a token visits 6.72 ranks in 4.63 other nodes of 8: it travels once to each"
    choice = choose(Layout(4, 4), 8, 2, LayoutConfig(ep=4, exchange="hierarchical"), False, 4)
    assert choice.reason == "EP groups of 4 ranks do not fill several nodes of 4: there is no second leg"


def test_the_size_of_a_node_comes_from_the_config_the_caller_or_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    layout = Layout(16, 16)
    assert choice_for(layout, 64, False, LayoutConfig(ep=16, node_size=8), 8, 2).node_size == 8
    assert choice_for(layout, 64, False, LayoutConfig(ep=16), 8, 2).node_size == 2
    assert choice_for(layout, 64, False, LayoutConfig(ep=16), 8).node_size == 4


def test_gloo_gathers_slowly_and_so_sends_to_those_who_are_visited() -> None:
    asked = Layout(2, 2), 64, 8, LayoutConfig(ep=2)
    assert choose(*asked, False, 8).kind == "allgather"
    choice = choose(*asked, False, 8, gathers_well=False)
    assert (choice.kind, choice.reason) == ("alltoall", "100% of the tokens visit each of the 2 ranks of an EP group")
    assert choice_for(Layout(2, 2), 64, False, LayoutConfig(ep=2), 8, 8).kind == "allgather", "nobody has joined yet"
    with joined(dist.HashStore(), World(0, 1, torch.device("cpu"), 30.0)):
        assert choice_for(Layout(2, 2), 64, False, LayoutConfig(ep=2), 8, 8).kind == "alltoall"
        asked_for = LayoutConfig(ep=2, exchange="allgather")
        assert choice_for(Layout(2, 2), 64, False, asked_for, 8, 8).kind == "allgather"
