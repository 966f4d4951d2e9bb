"""Naive Bayes features: how much each word, and each pair of words, tells the classes of the training texts apart.

Wang and Manning 2012, "Baselines and Bigrams: Simple, Good Sentiment and Topic Classification" (NBSVM): a linear model
learns faster and generalises better where each feature is first multiplied by its log-count ratio, section 2.2. A word
that is as frequent in one class as in another then says nothing, however often it occurs: it cannot be learnt by heart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.classifier import NaiveBayesConfig
from moe_train.models.ngrams import ngram_rows
from moe_train.moe.roles import Kind, Role


class NaiveBayes(nn.Module):
    """Scores of the classes from the set of a text's runs of tokens: the sum of weight times log-count ratio.

    Weights are learnt, from zero on; ratios come from the training texts (`fill_ratios`) and stay as they are. Runs
    that share a row by their hash share both.

    Args:
        config: lengths of the runs, rows, smoothing and scale.
        num_classes: classes C.

    Attributes:
        weight_NC: [N, C] per row of the table and class.
        ratios_NC: [N, C] log-count ratios; zero of runs in no training text, which then say nothing.
    """

    ratios_NC: Tensor

    def __init__(self, config: NaiveBayesConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.weight_NC = nn.Parameter(torch.empty(config.rows, num_classes))
        self.register_buffer("ratios_NC", torch.zeros(config.rows, num_classes))
        self.roles = {"weight_NC": Role(Kind.DENSE, 0.0)}

    def forward(self, tokens_BS: Tensor, valid_BS: Tensor) -> Tensor:
        """Return the scores [B, C] of the classes, in the dtype of the weights.

        Args:
            tokens_BS: [B, S] int64, padded on the right.
            valid_BS: [B, S] bool.
        """
        rows_BR, counts_BR = distinct_rows(tokens_BS, valid_BS, self.config)
        says_BRC = F.embedding(rows_BR, self.weight_NC) * F.embedding(rows_BR, self.ratios_NC)
        return self.config.scale * says_BRC.masked_fill(~counts_BR.unsqueeze(2), 0.0).sum(dim=1)

    @torch.no_grad()
    def fill_ratios(self, texts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Set the ratios to those of labelled texts.

        Args:
            texts: in batches of any size: tokens [B, S] int64, valid [B, S] bool, the number of each class [B] int64.
        """
        counts_NC = torch.zeros(self.ratios_NC.shape, dtype=torch.int64)
        for tokens_BS, valid_BS, classes_B in texts:
            rows_BR, counts_BR = distinct_rows(tokens_BS, valid_BS, self.config)
            cells_BR = rows_BR * counts_NC.shape[1] + classes_B.unsqueeze(1)
            counts_NC.view(-1).scatter_add_(0, cells_BR.flatten(), counts_BR.flatten().to(torch.int64))
        self.ratios_NC.copy_(log_count_ratios(counts_NC, self.config.smoothing))


def log_count_ratios(counts_NC: Tensor, smoothing: float) -> Tensor:
    """Return r_nc = ln((p_nc / Σ_n p_nc) / (q_nc / Σ_n q_nc)), [N, C] fp64; 0 for a row that occurs nowhere.

    With f_nc texts of class c that have a run of row n: p_nc = α + f_nc, and q_nc = α + Σ_c' f_nc' - f_nc counts the
    texts of all other classes. Both sums go over the rows that occur (Wang and Manning 2012, section 2.2, one class
    against the others).

    Args:
        counts_NC: f.
        smoothing: α.
    """
    f_NC = counts_NC.to(torch.float64)
    occurs_N1 = f_NC.sum(dim=1, keepdim=True) > 0
    p_NC = (smoothing + f_NC) * occurs_N1
    q_NC = (smoothing + f_NC.sum(dim=1, keepdim=True) - f_NC) * occurs_N1
    ratios_NC = (p_NC / p_NC.sum(dim=0)).log() - (q_NC / q_NC.sum(dim=0)).log()
    return torch.where(occurs_N1, ratios_NC, 0.0)


def distinct_rows(tokens_BS: Tensor, valid_BS: Tensor, config: NaiveBayesConfig) -> tuple[Tensor, Tensor]:
    """Return the rows of the runs in texts [B, R] int64, in ascending order, and which of them count [B, R] bool.

    A row counts once per text, however often its runs occur there; what lies in the padding never does.
    """
    runs = ngram_rows(tokens_BS, config.longest, config.rows, shortest=1)
    # A run whose last token is one of the text lies in it; the others go behind the last row.
    inside = (valid_BS[:, n:] for n in range(config.longest))
    rows = [rows_BR.masked_fill(~inside_BR, config.rows) for rows_BR, inside_BR in zip(runs, inside, strict=True)]
    sorted_BR = torch.cat(rows, dim=1).sort(dim=1).values
    counts_BR = sorted_BR < config.rows
    counts_BR[:, 1:] &= sorted_BR[:, 1:] != sorted_BR[:, :-1]
    return sorted_BR.clamp(max=config.rows - 1), counts_BR
