"""A model that tells the class of a text: the trunk of a language model, one vector of a text's tokens, a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.config.classifier import ExpertHeadConfig, Pool
from moe_train.config.model import ModelConfig
from moe_train.models.lexicon import Lexicon
from moe_train.models.naive_bayes import NaiveBayes
from moe_train.models.ngrams import NgramEmbedding
from moe_train.models.transformer import Answer, ModelLosses, Passed, Transformer
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.exchange import Exchange
from moe_train.moe.layer import MoELayer
from moe_train.moe.mlp_experts import MLPExperts
from moe_train.moe.modules import Linear
from moe_train.moe.record import ExpertLayer, LayerKey, LayerRecord
from moe_train.moe.routers import build_router
from moe_train.ops.loss import cross_entropy_sum

PART = "head"
"""Of the model: what the record of a head with experts is called (`LayerKey.part`)."""


@dataclass(frozen=True)
class ClassifierOutput(Answer):
    """What a classifier returns.

    Attributes:
        logits_BC: [B, C] scores of the classes, in the dtype of the activations; they mean nothing of a row without
            a token.
    """

    logits_BC: Tensor


class TextClassifier(Transformer):
    """Embedding, blocks and norm of a language model, by the same names; a text's vector; a head.

    The head is a linear map, or a layer with experts for which each text is a token. Its label is the largest of the
    text's labels: all others are IGNORE. Naive Bayes features and a lexicon, where there are such, add their scores to
    the head's; they see the whole text in training, too.

    Args:
        config: the model; ``classifier.num_classes`` is known.
        vocab_size: tokens V.
        exchange: brings tokens, and texts, to experts.
        dtype: of the activations.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, exchange: Exchange, dtype: torch.dtype) -> None:
        super().__init__(config, vocab_size, exchange, dtype)
        assert config.tie_embeddings and not config.mtp.depth, "these are of language models"
        assert config.classifier is not None and config.classifier.num_classes, "the classes are counted before this"
        self.token_dropout, self.pool = config.classifier.token_dropout, config.classifier.pool
        ngrams = config.classifier.ngrams
        self.ngrams = None if ngrams is None else NgramEmbedding(ngrams, config.dim, config.init_std)
        self.head = build_head(config, exchange)
        bayes, lexicon = config.classifier.naive_bayes, config.classifier.lexicon
        self.naive_bayes = None if bayes is None else NaiveBayes(bayes, config.classifier.num_classes)
        self.lexicon = None if lexicon is None else Lexicon(lexicon, config.classifier.num_classes)

    @property
    def outer_layers(self) -> dict[LayerKey, ExpertLayer]:
        """The head, if it has experts."""
        return {LayerKey(self.config.layers, PART): self.head} if isinstance(self.head, MoELayer) else {}

    def vectors(self, tokens_BS: Tensor) -> Tensor:
        """Return the tokens' vectors [B, S, D], with those of the runs that end with them."""
        x_BSD = super().vectors(tokens_BS)
        return x_BSD if self.ngrams is None else x_BSD + self.ngrams(tokens_BS)

    def seen(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingContext]:
        """Return the vectors [B, S, D] of the tokens that training leaves in, first in their rows, and their context.

        What is left of a text is a text: in attention, positions and routing nothing tells where a token was. But runs
        of tokens are those of the whole text: made of what is left they would be runs that nobody wrote.
        """
        if not (self.training and self.token_dropout):
            return x_BSD, context
        kept_BS = kept_tokens(context, self.token_dropout)
        order_BS = (~kept_BS).to(torch.int8).argsort(dim=1, stable=True)
        x_BSD = x_BSD.gather(1, order_BS.unsqueeze(2).expand_as(x_BSD))
        ids_BS, valid_BS = (values_BS.gather(1, order_BS) for values_BS in (context.ids_BS, kept_BS))
        return x_BSD, replace(context, ids_BS=ids_BS, valid_BS=valid_BS)

    def answer(self, passed: Passed, targets: Sequence[Tensor] | None) -> Answer:
        """Return `ClassifierOutput`; given the labels [B, S] `ModelLosses`, and given none the records alone."""
        context = passed.context
        text_BD = pooled(passed.x_BSD, context.valid_BS, self.pool)
        logits_BC, more = self.classify(text_BD.to(self.dtype), context.texts().at_layer(self.config.layers))
        valid_BS = passed.given.valid_T.view_as(passed.tokens_BS)
        for words in filter(None, (self.naive_bayes, self.lexicon)):
            logits_BC = logits_BC + words(passed.tokens_BS, valid_BS).to(logits_BC.dtype)
        records = (*passed.records, *more)
        if targets is None:
            return ClassifierOutput(logits_BC, records=records)
        losses = tuple(cross_entropy_sum(logits_BC, labels_BS.amax(dim=1)) for labels_BS in targets)
        return ModelLosses(losses, records=records)

    def classify(self, text_BD: Tensor, context: RoutingContext) -> tuple[Tensor, tuple[LayerRecord, ...]]:
        """Return the logits [B, C] of texts [B, D], each of which is a token of the context, and the head's records."""
        if not isinstance(self.head, MoELayer):
            return self.score(text_BD), ()
        output = self.head(text_BD.unsqueeze(1), context)
        return output.y_BSD.squeeze(1), (output.record,)


def build_head(config: ModelConfig, exchange: Exchange) -> Linear | MoELayer:
    """Build what stands between the vector of a text and the logits, with the experts that the exchange keeps here."""
    classifier, ffn, std = config.classifier, config.ffn, config.init_std
    assert classifier is not None and classifier.num_classes, "a classifier has classes"
    if not isinstance(classifier, ExpertHeadConfig):
        return Linear(config.dim, classifier.num_classes, std, biased=True)
    dims = (config.dim, *classifier.hidden_dims, classifier.num_classes)
    return MoELayer(
        router=build_router(ffn, config.dim, std),
        capacity=Capacity(ffn.capacity, ffn.num_experts, ffn.top_k),
        exchange=exchange,
        experts=MLPExperts(dims, exchange.experts, std, ffn.compute),
        balance=Balance(ffn),
        shared=None,
    )


def kept_tokens(context: RoutingContext, dropout: float) -> Tensor:
    """Return which tokens [B, S] bool stay: each with probability 1 - dropout, and of a text at least one.

    The token with the largest draw of its text would be the last to go: it stays. Draws are the tokens' own, so that
    no layout changes them.
    """
    draws_BS = context.uniform(Purpose.TOKEN_DROPOUT, 1).view_as(context.ids_BS)
    valid_BS = context.valid_T.view_as(context.ids_BS)
    draws_BS = draws_BS.masked_fill(~valid_BS, -1.0)
    return valid_BS & ((draws_BS >= dropout) | (draws_BS == draws_BS.amax(dim=1, keepdim=True)))


def pooled(x_BSD: Tensor, valid_BS: Tensor | None, pool: Pool) -> Tensor:
    """Return one vector [B, D] for the n valid positions of each row, at least fp32; zeros for a row that has none.

    Args:
        x_BSD: [B, S, D].
        valid_BS: [B, S] bool; None: all are valid.
        pool: mean: sum / n; root: sum / √n.
    """
    precise_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
    if valid_BS is None:
        valid_BS = torch.ones_like(x_BSD[..., 0], dtype=torch.bool)
    sums_BD = precise_BSD.masked_fill(~valid_BS.unsqueeze(2), 0.0).sum(dim=1)
    numbers_B1 = valid_BS.sum(dim=1, keepdim=True).clamp(min=1).to(precise_BSD.dtype)
    return sums_BD / (numbers_B1 if pool == "mean" else numbers_B1.sqrt())
