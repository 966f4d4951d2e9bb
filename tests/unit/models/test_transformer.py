"""The transformer as a whole: causality, tying, precision, padding, roles."""

import pytest
import torch
from model_samples import BATCH, FEATURES, LENGTH, VARIANTS, VOCAB, build, config_of, random_tokens
from torch.nn import functional as F

from moe_train.models.build import is_moe_layer
from moe_train.models.transformer import PRECISIONS, build_model
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.roles import Kind, roles_of

ALL = VARIANTS | FEATURES
EACH_VARIANT = pytest.mark.parametrize("variant", ALL)


@EACH_VARIANT
def test_no_token_sees_a_later_one(variant: str) -> None:
    """In training mode, where a capacity limit holds: a later token must not push an earlier one out."""
    model, tokens_BS = build(config_of(*ALL[variant])), random_tokens()
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
    model, tokens_BS = build(config_of(*ALL[variant])), random_tokens()
    together_BSV = model(tokens_BS).logits_BSV
    alone_BSV = torch.cat([model(tokens_S.unsqueeze(0)).logits_BSV for tokens_S in tokens_BS])
    assert torch.allclose(together_BSV, alone_BSV, rtol=0, atol=1e-12)


@EACH_VARIANT
def test_padding_at_the_end_changes_nothing_before_it(variant: str) -> None:
    model, tokens_BS = build(config_of(*ALL[variant])), random_tokens()
    valid_BS = (torch.arange(LENGTH) < 5).expand(BATCH, LENGTH)
    other_BS = torch.where(valid_BS, tokens_BS, 0)
    found, expected = (model(t_BS, RoutingContext.of(t_BS, valid_BS)) for t_BS in (other_BS, tokens_BS))
    assert torch.allclose(found.logits_BSV[:, :5], expected.logits_BSV[:, :5], rtol=0, atol=1e-12)
    for depth, a, b in zip(model.moe_layers, found.records, expected.records, strict=True):
        assert torch.equal(a.counts_E, b.counts_E)
        steps_ahead = max(0, depth + 1 - model.config.layers)  # of multi-token prediction: these see so many fewer
        assert a.tokens.item() == BATCH * (5 - steps_ahead)
        assert a.counts_E.sum().item() == a.tokens.item() * model.config.ffn.top_k


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
    model = build(config_of(*ALL[variant]), precision)
    output = model(random_tokens())
    scores = [output.logits_BSV, *output.mtp_logits]
    assert {logits_BSV.dtype for logits_BSV in scores} == {PRECISIONS[precision].activations}
    sum(logits_BSV.float().square().mean() for logits_BSV in scores).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == PRECISIONS[precision].weights, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} is not used"
    for layer in model.moe_layers.values():
        x_TD = torch.ones(BATCH * LENGTH, model.config.dim, dtype=model.dtype)
        routing = layer.router(x_TD, RoutingContext.of(random_tokens()))
        assert routing.logits_TE.dtype == PRECISIONS[precision].weights, "the router is never computed in bf16"


@pytest.mark.parametrize("variant", ["top-2", *FEATURES])
def test_bf16_is_near_fp32(variant: str) -> None:
    config = config_of(*ALL[variant])
    single, half = (build(config, precision)(random_tokens()).logits_BSV.float() for precision in ("fp32", "bf16"))
    assert (single - half).abs().mean() < 0.05 * single.abs().mean()


@EACH_VARIANT
def test_every_parameter_has_a_role(variant: str) -> None:
    model = build(config_of(*ALL[variant]))
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


@pytest.mark.parametrize(("first_dense", "every", "expected"), [(0, 1, [0, 1, 2, 3]), (2, 1, [2, 3]), (2, 2, [3])])
def test_the_first_layers_may_be_dense(first_dense: int, every: int, expected: list[int]) -> None:
    config = config_of("model.layers=4", f"model.ffn.every={every}", f"model.ffn.first_dense={first_dense}")
    assert list(build(config).moe_layers) == expected


@EACH_VARIANT
def test_the_meta_device_builds_the_same_model(variant: str) -> None:
    """Sizes of a model that no memory holds."""
    config = config_of(*ALL[variant])
    exchange = LocalExchange(config.ffn.num_experts)
    real, thought = build(config), build_model(config, VOCAB, exchange, "fp64", torch.device("meta"))
    assert all(tensor.is_meta for tensor in thought.state_dict().values())
    found, expected = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} for model in (thought, real)
    )
    assert found == expected


@EACH_VARIANT
def test_recomputing_a_forward_pass_gives_the_same(variant: str) -> None:
    model, tokens_BS = build(config_of(*ALL[variant])), random_tokens()
    assert torch.equal(model(tokens_BS).logits_BSV, model(tokens_BS).logits_BSV)


def test_multi_token_prediction_is_for_training_only() -> None:
    """And it changes nothing of what the model itself says."""
    with_modules, without = build(config_of("model.mtp.depth=2")), build(config_of())
    tokens_BS = random_tokens()
    output = with_modules(tokens_BS)
    assert [logits_BSV.shape for logits_BSV in output.mtp_logits] == [(BATCH, LENGTH, VOCAB)] * 2
    assert torch.equal(output.logits_BSV, without(tokens_BS).logits_BSV)
    assert list(with_modules.moe_layers) == [0, 1, 2, 3]
    assert len(output.records) == 4
    evaluated = with_modules.eval()(tokens_BS)
    assert evaluated.mtp_logits == ()
    assert len(evaluated.records) == 2


def test_a_module_sees_so_many_tokens_further() -> None:
    """Module k scores token i + k + 2 at position i: from tokens up to i + k + 1, and no later one."""
    model, tokens_BS = build(config_of("model.mtp.depth=2", "model.ffn.num_experts=0")), random_tokens()
    before = model(tokens_BS)
    for t in range(LENGTH):
        changed_BS = tokens_BS.clone()
        changed_BS[:, t] = (tokens_BS[:, t] + 1) % VOCAB
        after = model(changed_BS)
        for k, (a, b) in enumerate(zip(before.mtp_logits, after.mtp_logits, strict=True)):
            moved_S = (a - b).abs().amax(dim=(0, 2))[: LENGTH - k - 1] > 1e-9
            assert moved_S.tolist() == [i + k + 1 >= t for i in range(LENGTH - k - 1)], f"token {t}, module {k}"


def test_a_window_bounds_what_a_model_sees() -> None:
    """Two layers with windows of 3 see 2 · 2 positions back; one layer without makes it all."""
    tokens_BS = random_tokens()
    for full_every, reach in ((None, 4), (2, LENGTH)):
        extra = [] if full_every is None else [f"model.attention.full_every={full_every}"]
        model = build(config_of("model.attention.window=3", "model.ffn.num_experts=0", *extra))
        changed_BS = tokens_BS.clone()
        changed_BS[:, 0] = (tokens_BS[:, 0] + 1) % VOCAB
        moved_S = (model(tokens_BS).logits_BSV - model(changed_BS).logits_BSV).abs().amax(dim=(0, 2)) > 1e-9
        assert moved_S.tolist() == [i <= reach for i in range(LENGTH)]
