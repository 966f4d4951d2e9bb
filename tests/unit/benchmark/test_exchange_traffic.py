"""Where tokens go and what that must cost: against sets, and against what the meter counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.benchmark.journeys import RoundTrip
from moe_train.benchmark.traffic import Visits, Watched, draw_plan, journey_bytes
from moe_train.moe.capacity import Plan
from moe_train.moe.exchange import LocalExchange


def plan_of(routing: str = "balanced", num_tokens: int = 32, num_experts: int = 8, top_k: int = 2) -> Plan:
    return draw_plan(routing, num_tokens, num_experts, top_k, torch.Generator().manual_seed(0))


def pairs(experts_TK: list[list[int]], held: int) -> set[tuple[int, int]]:
    return {(token, expert // held) for token, row in enumerate(experts_TK) for expert in row}


@settings(max_examples=40, deadline=None)
@given(
    nodes=st.integers(1, 3),
    node_size=st.integers(1, 3),
    held=st.integers(1, 3),
    top_k=st.integers(1, 3),
    data=st.data(),
)
def test_visits_are_those_of_sets(nodes, node_size, held, top_k, data) -> None:
    num_ranks = nodes * node_size
    num_experts = held * num_ranks
    rank = data.draw(st.integers(0, num_ranks - 1))
    plan = plan_of(num_tokens=9, num_experts=num_experts, top_k=min(top_k, num_experts))
    found = Visits.of(plan, num_experts, rank, num_ranks, node_size)
    to = pairs(plan.experts_TK.tolist(), held)
    to_nodes = {(token, there // node_size) for token, there in to}
    assert found.tokens == 9
    assert found.others == len({(t, there) for t, there in to if there != rank})
    assert found.nodes == len({(t, node) for t, node in to_nodes if node != rank // node_size})
    assert found.onward == len({(t, there) for t, there in to if there % node_size != rank % node_size})


def test_what_is_not_kept_goes_nowhere() -> None:
    plan = plan_of()
    nothing = replace(plan, kept_TK=torch.zeros_like(plan.kept_TK), all_kept=False)
    assert Visits.of(nothing, 8, 0, 4, 2) == Visits(tokens=32)


def test_journeys_by_kind() -> None:
    visits = Visits(tokens=10, others=7, nodes=3, onward=5)
    found = [visits.journeys(kind, 4) for kind in ("local", "alltoall", "hierarchical", "allgather")]
    assert found == [0, 7, 8, 30]
    with pytest.raises(AssertionError, match="no closed form"):
        visits.journeys("pigeons", 4)


def test_a_journey_is_four_vectors_three_times_the_weights_and_the_ids() -> None:
    # bf16, D=512, K=2: rows and sums out and home and their gradients; weights out and their gradient home; ids.
    assert journey_bytes(512, 2, 2) == 4 * 512 * 2 + 2 * 2 * 4 + 2 * 4


@pytest.mark.parametrize(("num_experts", "top_k", "at_least"), [(8, 2, 2.0), (64, 6, 5.0)])
def test_zipf_is_skewed_and_balanced_is_not(num_experts, top_k, at_least) -> None:
    def fullest_over_mean(routing: str) -> float:
        counts_E = plan_of(routing, 4096, num_experts, top_k).experts_TK.flatten().bincount(minlength=num_experts)
        return float(counts_E.max() / counts_E.double().mean())

    assert fullest_over_mean("balanced") < 1.3
    assert fullest_over_mean("zipf") > at_least
    assert plan_of("zipf", 4096, num_experts, top_k).experts_TK.flatten().bincount().argmax() == 0


def test_an_exchange_is_watched_only_when_asked() -> None:
    watched = Watched(LocalExchange(8), num_experts=8, rank=0, num_ranks=4, node_size=2)
    x_TD, plan = torch.randn(32, 4), plan_of()
    watched.dispatch(x_TD, plan)
    assert watched.seen == Visits()
    watched.watches = True
    watched.dispatch(x_TD, plan)
    watched.dispatch(x_TD, plan)
    once = Visits.of(plan, 8, 0, 4, 2)
    assert watched.seen == once + once
    assert watched.experts == range(8)


@dataclass(frozen=True)
class Mistaken(LocalExchange):
    """Forgets the second choice of each token."""

    def dispatch(self, x_TD, plan):
        kept_TK = plan.kept_TK.clone()
        kept_TK[:, 1] = False
        return super().dispatch(x_TD, replace(plan, kept_TK=kept_TK, all_kept=False))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_round_trip_knows_its_error(dtype, within) -> None:
    grad_TD = torch.randn(32, 4).to(dtype)
    given = (plan_of(), torch.randn(32, 4).to(dtype).requires_grad_(), grad_TD)
    assert RoundTrip(LocalExchange(8), *given).error() < within
    assert RoundTrip(Mistaken(8), *given).error() > 0.1
