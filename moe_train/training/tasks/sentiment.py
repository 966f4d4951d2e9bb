"""Telling the class of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.data.corpus import LeaderFirst
from moe_train.data.labelled.corpus import LabelledCorpus, open_labelled
from moe_train.data.labelled.lexicon import open_lexicon
from moe_train.data.labelled.loader import TextLoader, labelled_texts
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.models.classifier import TextClassifier
from moe_train.models.transformer import Transformer
from moe_train.observe.classes import collapses
from moe_train.training.judge import judge
from moe_train.training.tasks.base import Figures, own_steps


@dataclass(frozen=True)
class Classification:
    """Every text has one class.

    Attributes:
        config: of the run, with the names of the classes, and their number in the model.
        texts: tokenizer, training texts and held-out texts with their classes.
    """

    config: TrainConfig
    texts: LabelledCorpus
    writes_text: ClassVar[bool] = False

    @staticmethod
    def open(config: TrainConfig, task: SentimentTask, leader_first: LeaderFirst) -> Classification:
        """Open the labelled texts; see `open_labelled`.

        Raises:
            ConfigError: the model has another number of classes.
        """
        corpus = open_labelled(config.data, config.tokenizer, task, leader_first)
        return Classification(with_classes(config, corpus.classes), corpus)

    def prepare(self, model: Transformer) -> list[str]:
        """Fill the log-count ratios of naive Bayes features, and the ratings of a lexicon; return its account.

        Raises:
            DataError: as `open_lexicon`.
        """
        assert isinstance(model, TextClassifier), "the rules of the configuration require a classifier"
        if model.naive_bayes is not None:
            batches = labelled_texts(self.texts.train, self.config.data.seq_len)
            model.naive_bayes.fill_ratios(batches)
        if model.lexicon is None:
            return []
        words = open_lexicon(model.lexicon.config, self.texts.tokenizer)
        model.lexicon.fill(words.ratings)
        return [words.account]

    def loader(self, world: World, micro_batch: int) -> TextLoader:
        """Return texts, of longer ones data.seq_len tokens."""
        return TextLoader(
            self.texts.train, **own_steps(self.config, world, micro_batch), window=self.config.data.window
        )

    def told_size(self) -> str:
        """Return texts, their tokens, the classes, and what was left out."""
        train, classes = self.texts.train, self.texts.classes
        size = f"{train.num_texts:,} texts of {train.num_tokens:,} tokens"
        return f"{size} in {len(classes)} classes ({', '.join(classes)}); {self.texts.account}"

    def tokens_after(self, step: int) -> int:
        """Return the tokens of so many texts of mean length, uncut."""
        train = self.texts.train
        return round(step * self.config.train.global_batch * train.num_tokens / train.num_texts)

    def evaluate(self, model: Transformer, world: World, mesh: Mesh, micro_batch: int, limit: int | None) -> Figures:
        """Return accuracy, F1, confusion matrix and what each expert took of each class."""
        store = self.texts.heldout
        if store.num_texts == 0:
            return {}
        return judge(model, store, self.texts.classes, world, mesh, self.config.data.seq_len, micro_batch, limit)

    def closing(self, final: Figures) -> list[str]:
        """Return the accuracy beside that of always telling the largest class, and whether all experts are used."""
        head = (
            f"held-out accuracy {final['accuracy']:.4f}, macro-F1 {final['macro_f1']:.4f} over {final['eval_texts']:,} "
            f"texts (always the largest class: {final['majority']:.4f}); loss {final['loss']:.4f} nats/text"
        )
        return [head, *collapses(final)]


def with_classes(config: TrainConfig, classes: tuple[str, ...]) -> TrainConfig:
    """Return the configuration with the names of the classes, and their number in the model.

    Raises:
        ConfigError: the model is configured for another number.
    """
    head = config.model.classifier
    assert head is not None, "the rules of the configuration require a classifier for task.kind=sentiment"
    if head.num_classes not in (None, len(classes)):
        rule = f"the texts have {len(classes)} classes: {', '.join(classes)}"
        raise ConfigError(Problem("model.classifier.num_classes", head.num_classes, rule, "leave it out"))
    model = config.model.model_copy(update={"classifier": head.model_copy(update={"num_classes": len(classes)})})
    task = SentimentTask(classes=classes)
    return config.model_copy(update={"model": model, "task": task})
