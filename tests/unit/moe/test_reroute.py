"""Rerouting against a plain loop, in one process and over parts of a batch."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import in_parts
from torch import Tensor

from moe_train.dist.peers import Alone, Peers
from moe_train.moe.queues import Queues
from moe_train.moe.reroute import reroute, reroute_reference
from moe_train.ops.topk import top_k

QUICK = settings(max_examples=80, deadline=None)


@dataclass(frozen=True)
class Full:
    """A batch in which some choices found no room."""

    ranking_TE: Tensor
    experts_TK: Tensor
    refused_TK: Tensor
    kept_TK: Tensor
    length: int
    limits_Q: Tensor

    @property
    def group_T(self) -> Tensor:
        return torch.arange(len(self.experts_TK)) // self.length

    def expected(self) -> tuple[Tensor, Tensor]:
        tables = (self.ranking_TE, self.experts_TK, self.refused_TK, self.kept_TK)
        return reroute_reference(*tables, self.group_T, self.limits_Q)

    def found(self, peers: Peers, tokens: slice = slice(None)) -> tuple[Tensor, Tensor]:
        queues = Queues(self.group_T[tokens], self.ranking_TE.shape[1], self.limits_Q, peers)
        tables = (self.ranking_TE, self.experts_TK, self.refused_TK, self.kept_TK)
        return reroute(*(table[tokens] for table in tables), queues)


@st.composite
def full_batches(draw: st.DrawFn, one_group: bool = False) -> Full:
    """Few distinct scores, so that rankings have ties, some of them -inf; queues are as full as they may be."""
    groups, length, experts = (draw(st.integers(1, high)) for high in (3, 5, 5))
    length, groups = (length * groups, 1) if one_group else (length, groups)
    top, tokens = draw(st.integers(1, experts)), groups * length
    scores = st.sampled_from([0.0, 1.0, 2.0, float("-inf")])
    ranking_TE = torch.tensor(draw(st.lists(scores, min_size=tokens * experts, max_size=tokens * experts)))
    ranking_TE = ranking_TE.view(tokens, experts)
    experts_TK = top_k(ranking_TE, top)
    fates = st.sampled_from(["kept", "refused", "refused", "padding"])
    fate = draw(st.lists(fates, min_size=tokens * top, max_size=tokens * top))
    kept_TK, refused_TK = (torch.tensor([f == name for f in fate]).view(tokens, top) for name in ("kept", "refused"))
    queue_TK = torch.arange(tokens).unsqueeze(1) // length * experts + experts_TK
    taken_Q = torch.bincount(queue_TK[kept_TK], minlength=groups * experts)
    spare = draw(st.lists(st.integers(0, 2), min_size=groups * experts, max_size=groups * experts))
    return Full(ranking_TE, experts_TK, refused_TK, kept_TK, length, taken_Q + torch.tensor(spare))


@QUICK
@given(full_batches())
def test_equals_a_plain_loop(case: Full) -> None:
    for found, expected in zip(case.found(Alone()), case.expected(), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(full_batches(one_group=True), st.integers(2, 4))
def test_over_parts_equals_a_plain_loop_over_all(case: Full, num_parts: int) -> None:
    cuts = [len(case.experts_TK) * part // num_parts for part in range(num_parts + 1)]
    parts = in_parts(lambda i, peers: case.found(peers, slice(cuts[i], cuts[i + 1])), num_parts)
    for found, expected in zip(zip(*parts, strict=True), case.expected(), strict=True):
        assert torch.equal(torch.cat(found), expected)


@QUICK
@given(full_batches())
def test_nobody_moves_to_a_full_expert_or_one_that_its_token_has(case: Full) -> None:
    experts_TK, moved_TK = case.found(Alone())
    assert (moved_TK <= case.refused_TK).all()
    assert torch.equal(experts_TK[~moved_TK], case.experts_TK[~moved_TK])
    queues = Queues(case.group_T, case.ranking_TE.shape[1], case.limits_Q, Alone())
    assert (queues.without(experts_TK, case.kept_TK | moved_TK).limits_Q >= 0).all()
    for row in experts_TK.tolist():
        assert len(set(row)) == len(row)
    assert (case.ranking_TE.gather(1, experts_TK)[moved_TK] > float("-inf")).all()


def test_a_refused_choice_takes_the_next_best_with_room_and_the_earlier_token_first() -> None:
    """Both tokens want 3, then 2, 1, 0; expert 2 has one place, expert 1 none, expert 0 two."""
    ranking_TE = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(2, 1)
    nothing_TK = torch.zeros(2, 1, dtype=torch.bool)
    queues = Queues(torch.zeros(2, dtype=torch.int64), 4, torch.tensor([2, 0, 1, 0]), Alone())
    experts_TK, moved_TK = reroute(ranking_TE, torch.tensor([[3], [3]]), ~nothing_TK, nothing_TK, queues)
    assert experts_TK.tolist() == [[2], [0]]
    assert moved_TK.all()


def test_two_refused_choices_of_a_token_ask_different_experts() -> None:
    ranking_TE = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    nothing_TK = torch.zeros(1, 2, dtype=torch.bool)
    queues = Queues(torch.zeros(1, dtype=torch.int64), 4, torch.tensor([1, 1, 0, 0]), Alone())
    experts_TK, moved_TK = reroute(ranking_TE, torch.tensor([[3, 2]]), ~nothing_TK, nothing_TK, queues)
    assert experts_TK.tolist() == [[1, 0]]
    assert moved_TK.all()
