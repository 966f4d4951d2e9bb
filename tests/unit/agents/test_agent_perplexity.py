"""Mixtures of distributions, against sums by hand and against what must hold for any of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from moe_train.agents.heldout import Reader, common, common_length, digest, require_task
from moe_train.agents.perplexity import fit_weights, linear_loss, mixture_scores, score_tokens
from moe_train.data.loader import Batch
from moe_train.errors import ConfigError, DataError
from moe_train.ops.loss import IGNORE

VOCAB = 5


def batches(draw, count=2):
    """Random labels, a few of them padding."""
    for number in range(count):
        labels_BS = torch.randint(0, VOCAB, (2, 3), generator=draw)
        labels_BS[number % 2, -1] = IGNORE
        yield Batch(torch.zeros(2, 3, dtype=torch.int64), labels_BS, 0)


def models(draw, rows):
    """Random scores for the batches, by model; a model may have more rows than the vocabulary."""
    tables = [[torch.randn(2, 3, row, generator=draw) for _ in range(2)] for row in rows]

    def score_of(table):
        steps = iter(table)
        return lambda batch: next(steps)

    return tables, [score_of(table) for table in tables]


def scored(seed, rows):
    draw = torch.Generator().manual_seed(seed)
    tables, scores = models(draw, rows)
    texts = list(batches(draw))
    return tables, texts, score_tokens(scores, texts, VOCAB)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(VOCAB, VOCAB + 2), min_size=1, max_size=3))
def test_token_by_token_is_the_same(seed, rows):
    tables, texts, found = scored(seed, rows)
    agents, geometric = [[] for _ in rows], []
    for step, batch in enumerate(texts):
        for row, label_row in enumerate(batch.labels_BS.tolist()):
            for position, label in enumerate(label_row):
                if label == IGNORE:
                    continue
                all_p = [table[step][row, position].double().softmax(0).tolist() for table in tables]
                products = [math.prod(p[v] for p in all_p) ** (1 / len(rows)) for v in range(VOCAB)]
                geometric.append(math.log(products[label] / sum(products)))
                for agent, p in zip(agents, all_p, strict=True):
                    agent.append(math.log(p[label]))
    torch.testing.assert_close(found.agents_PT, tensor(agents, dtype=torch.float64))
    torch.testing.assert_close(found.geometric_T, tensor(geometric, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_what_must_hold_of_any_mixture(seed, count):
    _, _, tokens = scored(seed, [VOCAB] * count)
    names = [str(i) for i in range(count)]
    found = mixture_scores(names, tokens, 0.0)
    assert found.tokens == 10 and found.fitted_tokens == 0 and found.weights == {}
    # By the concavity of the logarithm a mixture loses to the mean of its agents' losses never, and the normaliser of
    # a geometric mean is at most 1 (Hoelder).
    mean = sum(found.losses.values()) / count
    assert found.mixed["linear"] <= mean + 1e-12 and found.mixed["geometric"] <= mean + 1e-12
    # With equal weights it is worse than the best agent by log P at most.
    assert found.mixed["linear"] <= min(found.losses.values()) + math.log(count) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 4))
def test_fitted_weights_are_the_best(seed, count):
    """At the summit every weight's share in the likelihood is the weight: no move between two weights helps."""
    logs_PT = -torch.rand(count, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    weights_P = fit_weights(logs_PT)
    assert float(weights_P.sum()) == pytest.approx(1.0) and bool((weights_P >= 0).all())
    best = linear_loss(logs_PT, weights_P)
    for other in torch.eye(count, dtype=torch.float64):
        moved_P = 0.9 * weights_P + 0.1 * other
        assert best <= linear_loss(logs_PT, moved_P) + 1e-4
    assert best <= linear_loss(logs_PT, torch.full((count,), 1 / count, dtype=torch.float64)) + 1e-12


def test_equal_models_mix_to_themselves():
    logits = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    texts = list(batches(torch.Generator().manual_seed(1), count=1))
    found = mixture_scores(["a", "b"], score_tokens([lambda batch: logits] * 2, texts, VOCAB), 0.0)
    assert found.mixed == pytest.approx({"linear": found.losses["a"], "geometric": found.losses["b"]})


def test_weights_are_fitted_on_the_first_part_and_scored_on_the_rest():
    """Of two models the first knows the first part, the second the rest: what fits there is wrong here."""
    _, _, tokens = scored(0, [VOCAB, VOCAB])
    know, guess = -0.1, -3.0
    tokens.agents_PT[0], tokens.agents_PT[1] = guess, guess
    tokens.agents_PT[0, :4], tokens.agents_PT[1, 4:] = know, know
    found = mixture_scores(["a", "b"], tokens, 0.4)
    assert (found.fitted_tokens, found.tokens) == (4, 6)
    assert found.losses == pytest.approx({"a": 3.0, "b": 0.1})
    assert found.weights["a"] > 0.99 and found.mixed["fitted"] > 2.0 > found.mixed["linear"]


def test_figures():
    _, _, tokens = scored(0, [VOCAB])
    figures = mixture_scores(["a"], tokens, 0.0).figures(num_tokens=200, num_bytes=400)
    loss = figures["agents"]["a"]["loss"]
    assert figures["agents"]["a"]["perplexity"] == pytest.approx(math.exp(loss))
    assert figures["agents"]["a"]["bits_per_byte"] == pytest.approx(loss / math.log(2) / 2)
    assert figures["mixtures"].keys() == {"linear", "geometric"} and figures["tokens"] == 10


def test_only_what_is_alike_is_compared():
    assert common({"a": "x", "b": "x"}, "dir", "tokenizer") == "a"
    with pytest.raises(DataError) as caught:
        common({"a": "x", "b": "y", "c": "x", "d": "z"}, "dir", "corpus")
    assert [problem.key for problem in caught.value.problems] == ["mixture.agents.b.dir", "mixture.agents.d.dir"]
    assert "its corpus differs from a's" in str(caught.value) and "score.heldout_of=NAME" in str(caught.value)


def test_only_runs_of_the_right_task_are_scored():
    require_task({"a": "sentiment"}, "sentiment", "vote")
    with pytest.raises(DataError) as caught:
        require_task({"a": "sentiment", "b": "language", "c": "language"}, "sentiment", "vote")
    assert [problem.key for problem in caught.value.problems] == ["mixture.agents.b.dir", "mixture.agents.c.dir"]
    assert "mode=vote needs a classifier" in str(caught.value)


def test_the_length_of_sequences():
    readers = {"a": Reader(64, None), "b": Reader(32, 32)}
    assert common_length(readers, None) == 32 and common_length(readers, 16) == 16
    assert common_length({"a": readers["a"]}, 128) == 128
    with pytest.raises(ConfigError, match="b has 32 positions"):
        common_length(readers, 64)


def test_a_digest_tells_texts_and_labels_apart():
    found = {digest(texts, tensor(labels)) for texts, labels in [
        (["a", "b"], [0, 1]), (["ab", ""], [0, 1]), (["a", "b"], [1, 0]), (["b", "a"], [0, 1]),
    ]}  # fmt: skip
    assert len(found) == 4 and digest(["a", "b"], tensor([0, 1])) in found
