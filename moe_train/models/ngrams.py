"""Vectors of runs of tokens, beside those of the tokens themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.classifier import NgramConfig
from moe_train.moe.roles import Kind, Role

PRIME = 2**31 - 1
MULTIPLIER = 1_000_003
"""Of the hash: what it multiplies stays below 2^51, far within int64."""


class NgramEmbedding(nn.Module):
    """One table in which every run of 2, 3, ... tokens has a row, found by hashing (fastText, arXiv 1607.01759, 2.2).

    Runs that share a row share its vector: with rows in plenty those of frequent runs are mostly their own.

    Args:
        config: lengths, rows and scale.
        dim: width D of a token.
        std: standard deviation of the initial values.
    """

    def __init__(self, config: NgramConfig, dim: int, std: float) -> None:
        super().__init__()
        self.longest, self.scale = config.longest, config.scale
        self.table_ND = nn.Parameter(torch.empty(config.rows, dim))
        self.roles = {"table_ND": Role(Kind.DENSE, std)}

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return for each position the scaled sum of the vectors of the runs that end there: [B, S, D]."""
        rows = ngram_rows(tokens_BS, self.longest, len(self.table_ND))
        sums = (F.embedding(rows_BR, self.table_ND) for rows_BR in rows)
        # A text may be shorter than a run.
        padded = (F.pad(sums_BRD, (0, 0, n, 0))[:, : tokens_BS.shape[1]] for n, sums_BRD in enumerate(sums, start=1))
        return self.scale * torch.stack(list(padded)).sum(dim=0)


def ngram_rows(tokens_BS: Tensor, longest: int, num_rows: int, shortest: int = 2) -> list[Tensor]:
    """Return the rows of all runs in a table, by length: [B, S - n + 1] int64 for runs of n tokens.

    Args:
        tokens_BS: [B, S] int64.
        longest: length of the longest runs.
        num_rows: of the table.
        shortest: length of the shortest runs; 1: tokens themselves.
    """
    return [hashes_BR % num_rows for hashes_BR in run_hashes(tokens_BS, longest)[shortest - 1 :]]


def run_hashes(tokens_BS: Tensor, longest: int) -> list[Tensor]:
    """Return the hashes of all runs, by length from 1 on: [B, S - n + 1] int64 for runs of n, none where n is beyond S.

    The hash of a run is that of the run without its last token, times a number, plus the last: all modulo a prime, as
    in Rabin and Karp's search for strings. At the end it takes in the length: else a run of three and one of two could
    never differ for some pairs of tokens.

    Args:
        tokens_BS: [B, S] int64.
        longest: length of the longest runs.
    """
    found: list[Tensor] = []
    hashes_BS = tokens_BS
    for length in range(1, longest + 1):
        if length > 1:
            hashes_BS = (hashes_BS[:, :-1] * MULTIPLIER + tokens_BS[:, length - 1 :]) % PRIME
        found.append((hashes_BS * MULTIPLIER + length) % PRIME)
    return found
