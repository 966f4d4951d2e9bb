"""The transformer as a whole: causality, tying, precision, padding, roles."""

import pytest
import torch
from model_samples import BATCH, LENGTH, VARIANTS, VOCAB, build, config_of, random_tokens
from torch.nn import functional as F

from moe_train.models.transformer import PRECISIONS, is_moe_layer
from moe_train.moe.context import RoutingContext
from moe_train.moe.roles import Kind, roles_of

EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@EACH_VARIANT
def test_no_token_sees_a_later_one(variant: str) -> None:
    """In training mode, where a capacity limit holds: a later token must not push an earlier one out."""
    model, tokens_BS = build(config_of(*VARIANTS[variant])), random_tokens()
    logits_BSV = model(tokens_BS).logits_BSV
    for t in range(1, LENGTH):
        changed_BS = tokens_BS.clone()
        changed_BS[:, t:] = (tokens_BS[:, t:] + 1 + torch.arange(LENGTH - t)) % VOCAB
        changed_BSV = model(changed_BS).logits_BSV
        assert torch.allclose(changed_BSV[:, :t], logits_BSV[:, :t], rtol=0, atol=1e-12), f"position {t}"
        assert (changed_BSV[:, t] - logits_BSV[:, t]).abs().max() > 1e-6


def test_the_capacity_variant_drops() -> None:
    records = build(config_of(*VARIANTS["capacity"]))(random_tokens()).records
    assert sum(record.dropped_capacity.item() for record in records) > 0, "or its causality is not put to the test"


@EACH_VARIANT
def test_sequences_do_not_see_each_other(variant: str) -> None:
    model, tokens_BS = build(config_of(*VARIANTS[variant])), random_tokens()
    together_BSV = model(tokens_BS).logits_BSV
    alone_BSV = torch.cat([model(tokens_S.unsqueeze(0)).logits_BSV for tokens_S in tokens_BS])
    assert torch.allclose(together_BSV, alone_BSV, rtol=0, atol=1e-12)


@EACH_VARIANT
def test_padding_at_the_end_changes_nothing_before_it(variant: str) -> None:
    model, tokens_BS = build(config_of(*VARIANTS[variant])), random_tokens()
    valid_BS = (torch.arange(LENGTH) < 5).expand(BATCH, LENGTH)
    other_BS = torch.where(valid_BS, tokens_BS, 0)
    found, expected = (model(t_BS, RoutingContext.of(t_BS, valid_BS)) for t_BS in (other_BS, tokens_BS))
    assert torch.allclose(found.logits_BSV[:, :5], expected.logits_BSV[:, :5], rtol=0, atol=1e-12)
    for a, b in zip(found.records, expected.records, strict=True):
        assert torch.equal(a.counts_E, b.counts_E)
        assert a.counts_E.sum().item() == BATCH * 5 * model.config.ffn.top_k


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = build(config_of()), build(config_of("model.tie_embeddings=false"))
    assert tied.head is None
    assert "head.weight" not in dict(tied.named_parameters())
    assert untied.head is not None
    assert untied.head.weight.data_ptr() != untied.embedding_VD.data_ptr()
    # Its gradient comes from both ends: also rows of tokens that no input holds, by way of the softmax.
    logits_BSV = tied(torch.zeros(1, 3, dtype=torch.int64)).logits_BSV
    F.cross_entropy(logits_BSV.flatten(0, 1), torch.ones(3, dtype=torch.int64)).backward()
    assert tied.embedding_VD.grad is not None
    assert tied.embedding_VD.grad.abs().sum(dim=1).min() > 0


@EACH_VARIANT
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(variant: str, precision: str) -> None:
    model = build(config_of(*VARIANTS[variant]), precision)
    output = model(random_tokens())
    assert output.logits_BSV.dtype == PRECISIONS[precision].activations
    output.logits_BSV.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == PRECISIONS[precision].weights, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all(), name
    for layer in model.moe_layers.values():
        x_TD = torch.ones(BATCH * LENGTH, model.config.dim, dtype=model.dtype)
        routing = layer.router(x_TD, RoutingContext.of(random_tokens()))
        assert routing.logits_TE.dtype == PRECISIONS[precision].weights, "the router is never computed in bf16"


def test_bf16_is_near_fp32() -> None:
    single, half = (build(config_of(), precision)(random_tokens()).logits_BSV.float() for precision in ("fp32", "bf16"))
    assert (single - half).abs().mean() < 0.05 * single.abs().mean()


@EACH_VARIANT
def test_every_parameter_has_a_role(variant: str) -> None:
    model = build(config_of(*VARIANTS[variant]))
    roles = roles_of(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, role in roles.items():
        expected = Kind.EXPERT if ".experts." in name else Kind.ROUTER if ".router." in name else Kind.DENSE
        assert role.kind is expected, name


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_the_last_of_each_group_of_layers_is_moe(every: int, expected: list[int]) -> None:
    config = config_of("model.layers=4", f"model.ffn.every={every}")
    assert [layer for layer in range(4) if is_moe_layer(config.ffn, layer)] == expected
    model = build(config)
    assert list(model.moe_layers) == expected
    assert len(model(random_tokens()).records) == len(expected)
