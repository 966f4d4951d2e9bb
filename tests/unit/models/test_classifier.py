"""A classifier: padding is nowhere, a text is a text whoever stands beside it, the label is that of the text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import VOCAB, build, config_of, random
from torch import Tensor
from torch.nn import functional as F

from moe_train.models.classifier import (
    ClassifierOutput,
    TextClassifier,
    build_head,
    kept_tokens,
    pooled,
)
from moe_train.models.counts import count, head_size
from moe_train.models.transformer import ModelLosses, Transformer
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.layer import MoELayer
from moe_train.moe.record import LayerKey
from moe_train.ops.loss import IGNORE

CLASSES = "model.classifier.num_classes=3"
KINDS = {
    "encoder": ("model.classifier.kind=linear", "model.attention.causal=false"),
    "causal": ("model.classifier.kind=linear",),
    "no block": ("model.classifier.kind=experts", "model.layers=0", "model.ffn.router.kind=topk_softmax",
                 "model.ffn.router.gate_dim=5"),
    "runs of words": ("model.classifier.kind=linear", "model.classifier.pool=root", "model.classifier.token_norm=false",
                      "+model.classifier.ngrams.longest=3", "+model.classifier.ngrams.rows=13"),
    "rated words": ("model.classifier.kind=linear", "model.attention.causal=false",
                    "+model.classifier.lexicon.rows=40"),
    "naive Bayes": ("model.classifier.kind=linear", "model.attention.causal=false",
                    "+model.classifier.naive_bayes.rows=17"),
    "experts everywhere": ("model.classifier.kind=experts", "model.attention.causal=false", "model.norm=layer"),
}  # fmt: skip
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def built(kind: str, *more: str) -> TextClassifier:
    model = build(config_of(*KINDS[kind], CLASSES, *more))
    assert isinstance(model, TextClassifier)
    if model.naive_bayes is not None:  # it says nothing before it knows texts
        values = (model.naive_bayes.weight_NC.data, model.naive_bayes.ratios_NC)
        for value_NC in values:
            value_NC.normal_(generator=torch.Generator().manual_seed(2))
    if model.lexicon is not None:
        model.lexicon.weight_NC.data.normal_(generator=torch.Generator().manual_seed(2))
        model.lexicon.fill({(token, token + 1): token - 4.5 for token in range(0, VOCAB, 3)})
    return model


def texts_of(lengths: list[int], length: int = 7) -> tuple[Tensor, RoutingContext, Tensor]:
    """Tokens, context and labels of texts, some without a token; what stands at padding is a token like others."""
    tokens_BS = torch.randint(0, VOCAB, (len(lengths), length), generator=torch.Generator().manual_seed(1))
    valid_BS = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    labels_BS = torch.full_like(tokens_BS, IGNORE)
    for text, n in enumerate(lengths):
        if n:
            labels_BS[text, n - 1] = text % 3
    return tokens_BS, RoutingContext.of(tokens_BS, valid_BS), labels_BS


def logits_of(model: TextClassifier, tokens_BS: Tensor, context: RoutingContext) -> Tensor:
    output = model(tokens_BS, context)
    assert isinstance(output, ClassifierOutput)
    return output.logits_BC


@EACH_KIND
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_a_text_is_told_as_if_it_were_alone_and_unpadded(kind: str, lengths: list[int]) -> None:
    model = built(kind).eval()
    tokens_BS, context, _ = texts_of(lengths)
    logits_BC = logits_of(model, tokens_BS, context)
    assert logits_BC.isfinite().all()
    for text, n in enumerate(lengths):
        if n:
            alone_1S = tokens_BS[text : text + 1, :n]
            alone_1C = logits_of(model, alone_1S, RoutingContext.of(alone_1S))
            torch.testing.assert_close(logits_BC[text : text + 1], alone_1C, rtol=0, atol=1e-11)


@EACH_KIND
def test_what_stands_at_padding_has_no_influence_and_no_gradient(kind: str) -> None:
    model = built(kind).eval()
    tokens_BS, context, labels_BS = texts_of([5, 2, 0])
    assert context.valid_BS is not None
    tokens_BS[context.valid_BS] = tokens_BS[context.valid_BS] % 10
    tokens_BS[~context.valid_BS] = 20
    model(tokens_BS, replace(context, ids_BS=tokens_BS), [labels_BS]).loss_sums[0].backward()
    assert model.embedding_VD.grad is not None
    assert model.embedding_VD.grad[:10].any() and not model.embedding_VD.grad[20].any()


@EACH_KIND
def test_losses_are_those_of_the_logits(kind: str) -> None:
    model = built(kind).eval()
    tokens_BS, context, labels_BS = texts_of([4, 0, 7, 1])
    losses = model(tokens_BS, context, [labels_BS])
    assert isinstance(losses, ModelLosses)
    expected = F.cross_entropy(
        logits_of(model, tokens_BS, context)[[0, 2, 3]], torch.tensor([0, 2, 0]), reduction="sum"
    )
    torch.testing.assert_close(losses.loss_sums[0], expected)
    nothing = model(tokens_BS, context, ())
    assert nothing.loss_sums == ()
    for a, b in zip(nothing.records, losses.records, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_records_are_of_tokens_in_blocks_and_of_texts_in_the_head() -> None:
    model = built("experts everywhere").eval()
    tokens_BS, context, _ = texts_of([4, 0, 7, 1])
    records = model(tokens_BS, context).records
    assert list(model.expert_layers) == [LayerKey(0), LayerKey(1), LayerKey(2, "head")]
    assert LayerKey(2, "head").name == "layer_02_head"
    assert [int(record.tokens) for record in records] == [12, 12, 3]
    assert list(model.moe_layers) == [0, 1], "a head is no feed-forward layer"


def test_a_language_models_weights_fit_by_name_but_for_the_head() -> None:
    language = dict(build(config_of()).named_parameters())
    model = dict(built("encoder").named_parameters())
    assert {name: p.shape for name, p in language.items()}.items() <= {
        name: p.shape for name, p in model.items()
    }.items()
    assert model.keys() - language.keys() == {"head.weight", "head.bias"}
    assert type(build(config_of())) is Transformer


def test_the_small_head_has_the_parameters_of_its_source() -> None:
    """4 experts 20 -> 64 -> 32 -> 3 of 3,523 each, and a gate 20 -> 64 -> 4 of 1,604."""
    config = config_of("model=moe_classifier", "model.dim=20", "model.layers=0", CLASSES)
    head = build_head(config, LocalExchange(4))
    assert isinstance(head, MoELayer)
    assert sum(p.numel() for p in head.parameters()) == head_size(config).stored == 15_696
    assert sum(p.numel() for p in head.experts.parameters()) == 4 * 3_523
    model = build(config)
    assert sum(p.numel() for p in model.parameters()) == 15_696 + 20 * VOCAB == count(config, VOCAB, 8).total


@EACH_KIND
def test_counted_as_built(kind: str) -> None:
    model = built(kind)
    assert count(model.config, VOCAB, 8).total == sum(p.numel() for p in model.parameters())


def test_a_texts_vector_is_of_its_valid_places() -> None:
    x_BSD = random(3, 4, 5)
    valid_BS = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    mean_BD = pooled(x_BSD, valid_BS, "mean")
    torch.testing.assert_close(mean_BD[0], pooled(x_BSD, None, "mean")[0])
    torch.testing.assert_close(mean_BD[1], (x_BSD[1, 0] + x_BSD[1, 2]) / 2)
    assert not mean_BD[2].any()
    torch.testing.assert_close(pooled(x_BSD, valid_BS, "root"), mean_BD * torch.tensor([[4.0], [2.0], [1.0]]).sqrt())
    assert pooled(x_BSD.bfloat16(), valid_BS, "mean").dtype == torch.float32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("runs of words", "naive Bayes")])
def test_words_left_out_are_as_if_they_had_never_been_there(kind: str) -> None:
    """Training with dropout is training of the shorter texts without it; but for runs: those are the whole text's."""
    model = built(kind, "model.classifier.token_dropout=0.5").train()
    tokens_BS, context, labels_BS = texts_of([7, 3, 0, 1])
    kept_BS = kept_tokens(context, 0.5)
    assert 0 < kept_BS.sum() < 11
    found = model(tokens_BS, context, [labels_BS])
    model.token_dropout = 0.0
    expected = torch.zeros((), dtype=torch.float64)
    for text in (0, 1, 3):
        shorter_1S = tokens_BS[text, kept_BS[text]].unsqueeze(0)
        label_1S = torch.full_like(shorter_1S, IGNORE)
        label_1S[0, -1] = text % 3
        expected = expected + model(shorter_1S, RoutingContext.of(shorter_1S), [label_1S]).loss_sums[0].detach()
    torch.testing.assert_close(found.loss_sums[0].detach(), expected)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(0.0, 0.99), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_text_keeps_at_least_one_word_and_padding_stays_padding(
    lengths: list[int], dropout: float, seed: int
) -> None:
    _, context, _ = texts_of(lengths, 9)
    kept_BS = kept_tokens(replace(context, seed=seed), dropout)
    assert context.valid_BS is not None
    assert not (kept_BS & ~context.valid_BS).any()
    assert torch.equal(kept_BS.any(dim=1), context.valid_BS.any(dim=1))
    assert torch.equal(kept_tokens(replace(context, seed=seed), 0.0), context.valid_BS)


def test_words_are_left_out_by_their_share_anew_in_each_step_and_by_their_place() -> None:
    _, context, _ = texts_of([7] * 400)
    kept_BS = kept_tokens(context, 0.3)
    assert 0.67 < kept_BS.double().mean() < 0.73
    assert not torch.equal(kept_BS, kept_tokens(replace(context, seed=1), 0.3))
    half = RoutingContext(context.ids_BS[200:], context.sequences_B[200:], None)
    assert torch.equal(kept_tokens(half, 0.3), kept_BS[200:]), "another rank draws the same"


def test_evaluation_leaves_nothing_out() -> None:
    model = built("encoder", "model.classifier.token_dropout=0.9")
    tokens_BS, context, _ = texts_of([7, 3])
    model.eval()
    whole = logits_of(model, tokens_BS, context)
    model.token_dropout = 0.0
    assert torch.equal(logits_of(model.train(), tokens_BS, context), whole)


def test_causal_and_whole_attention_differ() -> None:
    """Else the tests above would not see which one is used."""
    tokens_BS, context, _ = texts_of([7, 3])
    a, b = (logits_of(built(kind).eval(), tokens_BS, context) for kind in ("encoder", "causal"))
    assert (a - b).abs().max() > 1e-4
