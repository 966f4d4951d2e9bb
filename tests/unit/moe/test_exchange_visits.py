"""The tables of visits, against loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from waiting import NoWaiting

from moe_train.moe.exchange.visits import Counts, VisitMap, among, map_visits, sum_visits, visits


@dataclass(frozen=True)
class Place:
    """A rank of a group that does not exist."""

    own: int
    group_name: str = "nobody"

    def rank(self) -> int:
        return self.own


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Visits [P, T] and a rank."""
    num_ranks, num_tokens = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    rows = st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)
    table = draw(st.lists(rows, min_size=num_ranks, max_size=num_ranks))
    return torch.tensor(table, dtype=torch.bool).view(num_ranks, num_tokens), draw(st.integers(0, num_ranks - 1))


def mapped(visited_PT: Tensor, own: int) -> VisitMap:
    sent = visited_PT.sum(dim=1).tolist()
    with NoWaiting():
        return map_visits(visited_PT, Place(own), Counts(sent, sent))


@settings(deadline=None, max_examples=60)
@given(tables())
def test_a_row_for_each_visit_those_of_the_own_rank_first(table: tuple[Tensor, int]) -> None:
    visited_PT, own = table
    num_ranks, num_tokens = visited_PT.shape
    order = [own, *(rank for rank in range(num_ranks) if rank != own)]
    rows = [(rank, token) for rank in order for token in range(num_tokens) if visited_PT[rank, token]]
    found = mapped(visited_PT, own)
    assert found.tokens_N.tolist() == [token for _, token in rows]
    by_token = [[rows.index((rank, token)) for rank in order if visited_PT[rank, token]] for token in range(num_tokens)]
    assert found.slots_N.tolist() == [row for own_rows in by_token for row in own_rows]
    assert found.starts_T.tolist() == [sum(map(len, by_token[:token])) for token in range(num_tokens)]


@settings(deadline=None, max_examples=30)
@given(tables(), st.integers(0, 99))
def test_sums_are_the_adjoint_of_copies(table: tuple[Tensor, int], seed: int) -> None:
    visited_PT, own = table
    found = mapped(visited_PT, own)
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randint(-9, 10, (visited_PT.shape[1], 3), generator=generator).double()
    y_ND = torch.randint(-9, 10, (len(found.tokens_N), 3), generator=generator).double()
    sums_TD = sum_visits(y_ND, found.slots_N, found.starts_T)
    assert sums_TD.shape == x_TD.shape
    assert (x_TD[found.tokens_N] * y_ND).sum() == (x_TD * sums_TD).sum()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_who_is_visited_and_which_experts_are_here(data: st.DataObject) -> None:
    num_ranks, held, top_k = (data.draw(st.integers(1, 4)) for _ in range(3))
    num_experts, num_tokens = num_ranks * held, data.draw(st.integers(0, 5))
    choices = st.lists(st.integers(0, num_experts), min_size=top_k, max_size=top_k)
    experts = data.draw(st.lists(choices, min_size=num_tokens, max_size=num_tokens))
    experts_TK = torch.tensor(experts, dtype=torch.int64).view(num_tokens, top_k)
    expected = [[any(e // held == rank for e in chosen) for chosen in experts] for rank in range(num_ranks)]
    with NoWaiting():
        assert visits(experts_TK, num_experts, num_ranks).tolist() == expected
    for rank in range(num_ranks):
        here = range(rank * held, (rank + 1) * held)
        local = [[e - here.start if e in here else held for e in chosen] for chosen in experts]
        assert among(experts_TK, here).tolist() == local
    assert experts_TK.tolist() == experts, "nothing was changed in its place"
