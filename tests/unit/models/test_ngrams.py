"""Runs of tokens: their rows by plain arithmetic, and whom they reach."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_classifier import run_row

from moe_train.config.classifier import NgramConfig
from moe_train.models.ngrams import NgramEmbedding, ngram_rows

TEXTS = st.lists(st.integers(0, 200_000), min_size=1, max_size=6)


@given(TEXTS, st.integers(2, 4), st.integers(1, 99))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_plain_arithmetic(text: list[int], longest: int, num_rows: int) -> None:
    found = ngram_rows(torch.tensor([text]), longest, num_rows)
    tokens, *runs = ngram_rows(torch.tensor([text]), longest, num_rows, shortest=1)
    assert [rows_BR.tolist() for rows_BR in runs] == [rows_BR.tolist() for rows_BR in found]
    assert tokens[0].tolist() == [run_row([token], num_rows) for token in text]
    expected = [[run_row(text[s : s + n], num_rows) for s in range(len(text) - n + 1)] for n in range(2, longest + 1)]
    assert [rows_BR[0].tolist() for rows_BR in found] == expected


@given(TEXTS, st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_a_place_gets_the_runs_that_end_there(text: list[int], longest: int) -> None:
    layer = NgramEmbedding(NgramConfig(longest=longest, rows=17, scale=0.5), 3, 1.0).double()
    with torch.no_grad():
        layer.table_ND.copy_(torch.randn(17, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        found_SD = layer(torch.tensor([text]))[0]
    for s, found_D in enumerate(found_SD):
        runs = [text[s - n + 1 : s + 1] for n in range(2, longest + 1) if s >= n - 1]
        expected_D = sum((layer.table_ND[run_row(run, 17)] for run in runs), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(found_D, 0.5 * expected_D.detach())


def test_runs_of_the_same_tokens_in_another_order_are_others() -> None:
    rows = ngram_rows(torch.tensor([[5, 6, 5, 6, 6]]), 2, 10**6)[0][0].tolist()
    assert rows[0] == rows[2] and len(set(rows)) == 3
