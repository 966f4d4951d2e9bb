"""Everything that training needs of labelled texts: tokenizer, classes, texts to train on, texts held out."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.config.task import SentimentTask
from moe_train.data.corpus import LeaderFirst
from moe_train.data.labelled.prepare import prepare_labelled
from moe_train.data.labelled.store import TextStore
from moe_train.data.progress import console_progress, no_progress
from moe_train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelledCorpus:
    """Labelled texts that are ready for training.

    Attributes:
        tokenizer: made the tokens.
        train: texts to train on.
        heldout: held-out texts; none when data.heldout_fraction is 0.
        classes: names of the classes by number.
        fingerprint: 64 hex digits; equal when texts, classes, split and tokenizer are.
        account: a line on how many texts there are, which were removed, and why.
    """

    tokenizer: Tokenizer
    train: TextStore
    heldout: TextStore
    classes: tuple[str, ...]
    fingerprint: str
    account: str


def open_labelled(
    data: DataConfig, tokenizer: TokenizerConfig, task: SentimentTask, leader_first: LeaderFirst
) -> LabelledCorpus:
    """Open labelled texts on this rank; the leader prepares them first if that was not done before.

    Ranks that do not see the leader's cache (nodes without a shared file system) prepare their own, one per cache.

    Args:
        data: the texts.
        tokenizer: the tokenizer.
        task: names the classes.
        leader_first: called on every rank.

    Raises:
        DataError: texts that are missing, unreadable or without classes; prepared files that are damaged.
    """
    leader_first(lambda: prepare_labelled(data, tokenizer, task, console_progress))
    prepared = prepare_labelled(data, tokenizer, task, no_progress)
    return LabelledCorpus(
        tokenizer=prepared.manifest.tokenizer(prepared.folder),
        train=TextStore(prepared, "train"),
        heldout=TextStore(prepared, "heldout"),
        classes=prepared.manifest.classes,
        fingerprint=prepared.manifest.fingerprint,
        account=prepared.manifest.account(),
    )
