"""Everything that training needs of its text: tokenizer, training tokens, held-out tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.manifest import MANIFEST_NAME, PreparedCorpus
from moe_train.data.pack import prepare
from moe_train.data.progress import console_progress, no_progress
from moe_train.data.sources.files import expand
from moe_train.data.store import TokenStore
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError, Problem

LeaderFirst = Callable[[Callable[[], object]], None]
"""Runs a function on one rank while the others wait; raises on all ranks when it fails."""


@dataclass(frozen=True)
class Corpus:
    """A corpus that is ready for training.

    Attributes:
        tokenizer: made the tokens.
        train: tokens to train on.
        heldout: tokens of the held-out documents; none when data.heldout_fraction is 0.
        fingerprint: 64 hex digits; equal when texts, split and tokenizer are.
    """

    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore
    fingerprint: str


def open_corpus(data: DataConfig, tokenizer: TokenizerConfig, leader_first: LeaderFirst) -> Corpus:
    """Open the corpus on this rank; the leader prepares it first if that was not done before.

    Ranks that do not see the leader's cache (nodes without a shared file system) prepare their own, one per cache.

    Args:
        data: the corpus.
        tokenizer: the tokenizer; token files (source ``tokens``) bring theirs and ignore it.
        leader_first: called on every rank.

    Raises:
        DataError: text or token files that are missing, unreadable or damaged.
    """
    if data.source == "tokens":
        corpora = find_prepared(data)
    else:
        leader_first(lambda: prepare(data, tokenizer, None, console_progress))
        corpora = [prepare(data, tokenizer, None, no_progress)]
    fingerprints = [corpus.manifest.fingerprint for corpus in corpora]
    return Corpus(
        tokenizer=corpora[0].tokenizer(),
        train=TokenStore(corpora, "train"),
        heldout=TokenStore(corpora, "heldout"),
        fingerprint=fingerprints[0] if len(corpora) == 1 else sha256("".join(fingerprints).encode()).hexdigest(),
    )


def find_prepared(data: DataConfig) -> list[PreparedCorpus]:
    """Return the folders of tokens that data.path names, sorted.

    Raises:
        DataError: no such folder, an incomplete one, or folders of different tokenizers.
    """
    assert data.path is not None, "the rules of the configuration require data.path for tokens"
    folders = expand(data.path)
    if not folders:
        remedy = "name a folder that moe_train.prepare wrote"
        raise DataError(Problem("data.path", data.path, "does not exist and matches no folder", remedy))
    corpora = [PreparedCorpus.open(folder) for folder in folders]
    strangers = [
        Problem(
            str(corpus.folder / MANIFEST_NAME),
            None,
            f"its tokenizer is not that of {corpora[0].folder}",
            "prepare both with one tokenizer (tokenizer.kind=file)",
        )
        for corpus in corpora
        if corpus.manifest.tokenizer_fingerprint != corpora[0].manifest.tokenizer_fingerprint
    ]
    if strangers:
        raise DataError(strangers)
    return corpora
