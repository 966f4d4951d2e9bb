"""Predicting the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_train.config.schema import TrainConfig
from moe_train.data.corpus import Corpus, LeaderFirst, open_corpus
from moe_train.data.loader import TrainLoader
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.models.transformer import Transformer
from moe_train.training.evaluate import evaluate
from moe_train.training.tasks.base import Figures, own_steps


@dataclass(frozen=True)
class LanguageModelling:
    """Every token of a text is predicted from those before it.

    Attributes:
        config: of the run.
        texts: tokenizer, training text and held-out text, each one stream of tokens.
    """

    config: TrainConfig
    texts: Corpus
    writes_text: ClassVar[bool] = True

    @staticmethod
    def open(config: TrainConfig, leader_first: LeaderFirst) -> LanguageModelling:
        """Open the corpus; see `open_corpus`."""
        return LanguageModelling(config, open_corpus(config.data, config.tokenizer, leader_first))

    def prepare(self, model: Transformer) -> list[str]:
        """Do nothing: a language model has no such values."""
        return []

    def loader(self, world: World, micro_batch: int) -> TrainLoader:
        """Return windows of the stream."""
        return TrainLoader(self.texts.train, **own_steps(self.config, world, micro_batch))

    def told_size(self) -> str:
        """Return the tokens of the stream."""
        return f"{self.texts.train.num_tokens:,} tokens of text"

    def tokens_after(self, step: int) -> int:
        """Return the tokens of so many whole batches."""
        return step * self.config.train.global_batch * self.config.data.seq_len

    def evaluate(self, model: Transformer, world: World, mesh: Mesh, micro_batch: int, limit: int | None) -> Figures:
        """Return loss, perplexity and bits per byte of the held-out text."""
        store = self.texts.heldout
        if store.num_tokens < 2:
            return {}
        return dict(evaluate(model, store, world, mesh, self.config.data.seq_len, micro_batch, limit))

    def closing(self, final: Figures) -> list[str]:
        """Return the loss beside that of a model that ignores context."""
        lines = [
            f"held-out loss {final['loss']:.4f} nats/token, perplexity {final['perplexity']:.1f}; "
            f"{final['bits_per_byte']:.3f} bits/byte (unigram entropy of the same tokens: "
            f"{final['unigram_bits_per_byte']:.3f})"
        ]
        if "loss_looking_ahead" in final:
            lines.append(
                f"with choices that know later tokens, which no generation makes: {final['loss_looking_ahead']:.4f} "
                f"nats/token, {final['bits_per_byte_looking_ahead']:.3f} bits/byte"
            )
        return lines
