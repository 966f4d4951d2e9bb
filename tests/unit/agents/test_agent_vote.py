"""The vote of classifiers, against a count by hand."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from moe_train.agents.vote import majority, vote_scores


def by_hand(probabilities_PNC):
    """The rule text by text, with exact sums of the dyadic probabilities that the tests draw."""
    chosen = []
    for text in range(probabilities_PNC.shape[1]):
        rows = [rows_NC[text].tolist() for rows_NC in probabilities_PNC]
        votes = Counter(row.index(max(row)) for row in rows)
        tied = [label for label in sorted(votes) if votes[label] == max(votes.values())]
        chosen.append(max(tied, key=lambda label: (sum(row[label] for row in rows), -label)))
    return chosen


@st.composite
def tables(draw):
    """[P, N, C] numbers in eighths: ties are frequent, and sums of them exact."""
    shape = [draw(st.integers(1, size)) for size in (5, 4, 3)]
    count = shape[0] * shape[1] * shape[2]
    eighths = draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    return torch.tensor(eighths, dtype=torch.float32).view(*shape) / 8


@settings(max_examples=30, deadline=None)
@given(tables())
def test_the_vote_is_the_rule(probabilities_PNC):
    assert majority(probabilities_PNC).tolist() == by_hand(probabilities_PNC)


@settings(max_examples=30, deadline=None)
@given(tables(), st.randoms())
def test_the_order_of_the_agents_does_not_matter(probabilities_PNC, draw):
    order = list(range(len(probabilities_PNC)))
    draw.shuffle(order)
    assert torch.equal(majority(probabilities_PNC), majority(probabilities_PNC[order]))


@settings(max_examples=30, deadline=None)
@given(tables())
def test_one_agent_and_its_copies_vote_as_it_does(probabilities_PNC):
    one = probabilities_PNC[:1]
    assert torch.equal(majority(one), one[0].argmax(dim=-1))
    assert torch.equal(majority(one.expand(3, -1, -1)), majority(one))


def test_two_weak_votes_outweigh_a_sure_one_and_a_tie_goes_to_the_surer():
    two_to_one = tensor([[[0.4, 0.6]], [[0.4, 0.6]], [[1.0, 0.0]]])
    assert majority(two_to_one).tolist() == [1]
    assert majority(two_to_one[1:]).tolist() == [0]


def test_scores():
    """Three classifiers that each err on another text of three: the vote errs on none."""
    right, wrong = [0.2, 0.8], [0.9, 0.1]
    probabilities_PNC = tensor([[wrong, right, right], [right, wrong, right], [right, right, wrong]])
    found = vote_scores(["a", "b", "c"], probabilities_PNC, tensor([1, 1, 1]))
    assert found.agents == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 2 / 3})
    assert (found.vote, found.unanimous, found.texts) == (1.0, 0.0, 3)
    # (0.1 + 0.8 + 0.8) / 3 > 1 / 2
    assert found.mean == 1.0
