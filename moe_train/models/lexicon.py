"""What a text's words say whose ratings are known beforehand: from a lexicon, not from the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from moe_train.config.classifier import LexiconConfig
from moe_train.models.ngrams import run_hashes
from moe_train.moe.roles import Kind, Role

Ratings: TypeAlias = Mapping[tuple[int, ...], float]
"""The rating of each word, which is a run of tokens."""
SIGNS = ("positive", "negative")
"""Ratings of each sign are summed apart: praise that is taken back is not the same as no praise."""
NO_RUN = 2**62
"""Above all hashes, which so stay in order: what stands where there are no more words."""


class Lexicon(nn.Module):
    """Scores of the classes from the ratings v of a text's words: Σ max(v, 0) and Σ min(v, 0), each times a weight.

    A word stands where its run of tokens does; where two begin at one token, the longer one counts. So a word is also
    found at the beginning of longer ones ("hope" in "hopefully") that are neither in the lexicon nor one token. Runs
    are told apart by a hash below 2^31: among so many others about as many as there are words are taken for one.

    The weights are learnt, from zero on; the ratings come from a file (`fill`) and stay as they are.

    Args:
        config: longest words, room and scale.
        num_classes: classes C.

    Attributes:
        weight_NC: [2, C] per sign and class.
        hashes_N: [rows] int64, ascending, of the words.
        ratings_N: [rows] of the words.
    """

    hashes_N: Tensor
    ratings_N: Tensor

    def __init__(self, config: LexiconConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.weight_NC = nn.Parameter(torch.empty(len(SIGNS), num_classes))
        self.register_buffer("hashes_N", torch.full((config.rows,), NO_RUN))
        self.register_buffer("ratings_N", torch.zeros(config.rows))
        self.roles = {"weight_NC": Role(Kind.DENSE, 0.0)}

    def forward(self, tokens_BS: Tensor, valid_BS: Tensor) -> Tensor:
        """Return the scores [B, C] of the classes, in the dtype of the weights.

        Args:
            tokens_BS: [B, S] int64, padded on the right.
            valid_BS: [B, S] bool.
        """
        ratings_BS = self.ratings(tokens_BS, valid_BS)
        sums_BN = torch.stack([ratings_BS.clamp(min=0).sum(dim=1), ratings_BS.clamp(max=0).sum(dim=1)], dim=1)
        return self.config.scale * sums_BN.to(self.weight_NC.dtype) @ self.weight_NC

    def ratings(self, tokens_BS: Tensor, valid_BS: Tensor) -> Tensor:
        """Return the rating [B, S] of the longest word that begins at each token; 0 where none does."""
        found_BS = torch.zeros(tokens_BS.shape, dtype=self.ratings_N.dtype, device=tokens_BS.device)
        for length, hashes_BR in enumerate(run_hashes(tokens_BS, self.config.longest), start=1):
            places_BR = torch.searchsorted(self.hashes_N, hashes_BR).clamp(max=len(self.hashes_N) - 1)
            # A run whose last token is one of the text lies in it.
            is_word_BR = (self.hashes_N[places_BR] == hashes_BR) & valid_BS[:, length - 1 :]
            begins_BR = found_BS[:, : hashes_BR.shape[1]]
            begins_BR.copy_(torch.where(is_word_BR, self.ratings_N[places_BR], begins_BR))
        return found_BS

    @torch.no_grad()
    def fill(self, ratings: Ratings) -> None:
        """Set the words and their ratings.

        Args:
            ratings: of no more words than there are rows, of none longer than the configuration says.
        """
        assert len(ratings) <= len(self.hashes_N), "whoever reads the words sees to it"
        hashed = {hash_of(run): rating for run, rating in ratings.items()}
        hashes = sorted(hashed)
        self.hashes_N.fill_(NO_RUN)[: len(hashes)] = torch.tensor(hashes, dtype=torch.int64)
        self.ratings_N.zero_()[: len(hashes)] = torch.tensor([hashed[each] for each in hashes], dtype=torch.float64)


def hash_of(run: Sequence[int]) -> int:
    """Return the hash of one run of tokens."""
    return int(run_hashes(torch.tensor([list(run)], dtype=torch.int64), len(run))[-1])
