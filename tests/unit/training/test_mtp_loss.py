"""Multi-token prediction: its targets, its loss, what its modules see, and that they change nothing else."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import BOUNDARY, VOCAB, Case, rank_batches
from torch import Tensor

from moe_train.dist.mesh import Mesh
from moe_train.models.transformer import ModelLosses, Transformer
from moe_train.moe.context import RoutingContext
from moe_train.ops.loss import IGNORE, cross_entropy_sum
from moe_train.parallel.engine import TorchEngine
from moe_train.training.mtp import MTPLoss, labels_ahead, mtp_labels, mtp_loss
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

TWO = ("model.mtp.depth=2",)
OFF = ("balance.aux=null", "balance.z_loss=null")
VARIANTS = {
    "top-2": (),
    "capacity, later tokens never before earlier ones": ("capacity.kind=factor", "capacity.factor=0.8"),
    "latent attention": ("model.attention.kind=mla", "model.attention.kv_rank=5", "model.attention.rope_dim=4",
                         "model.attention.nope_dim=4", "model.attention.v_dim=3"),
    "sinks": ("model.attention.sinks=true",),
    "dense, untied": ("model.ffn.num_experts=0", "model.tie_embeddings=false"),
    "hash": ("router.kind=hash", *OFF),
}  # fmt: skip


def model_of(*overrides: str) -> Transformer:
    return Case("ahead", (*TWO, *overrides)).whole_model()


def text(batch: int = 3, length: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@st.composite
def labels(draw: st.DrawFn) -> Tensor:
    """Of a few sequences with many ends of documents; the last places of each may have no target."""
    length = draw(st.integers(1, 9))
    token = st.integers(0, 3).map(lambda number: BOUNDARY if number == 3 else number)
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        valid = draw(st.integers(0, length))
        rows.append([draw(token) if place < valid else IGNORE for place in range(length)])
    return torch.tensor(rows)


def target_by_hand(row: list[int], place: int, steps: int, boundary: int | None) -> int:
    """Walk from label to label; the walk ends with the text or behind a boundary."""
    for step in range(steps):
        if boundary is not None and row[place + step] == boundary:
            return IGNORE
        if place + step + 1 == len(row):
            return IGNORE
    return row[place + steps]


@settings(max_examples=150, deadline=None)
@given(labels(), st.integers(1, 10), st.sampled_from([BOUNDARY, None]))
def test_labels_ahead_are_those_of_a_plain_walk(labels_BS: Tensor, steps: int, boundary: int | None) -> None:
    before = labels_BS.clone()
    expected = [[target_by_hand(row, i, steps, boundary) for i in range(len(row))] for row in labels_BS.tolist()]
    assert labels_ahead(labels_BS, steps, boundary).tolist() == expected
    assert torch.equal(labels_BS, before)


def test_a_document_that_ends_stops_all_predictions_beyond_it() -> None:
    row = torch.tensor([[1, 2, BOUNDARY, 3, 4, 1, IGNORE]])
    end = BOUNDARY
    assert labels_ahead(row, 1, end).tolist() == [[2, end, IGNORE, 4, 1, IGNORE, IGNORE]]
    assert labels_ahead(row, 2, end).tolist() == [[end, IGNORE, IGNORE, 1, IGNORE, IGNORE, IGNORE]]
    assert labels_ahead(row, 1, None).tolist() == [[2, end, 3, 4, 1, IGNORE, IGNORE]]


def loss_of(logits: list[Tensor], labels_BS: Tensor, boundary: int | None) -> MTPLoss:
    """What the modules lose by these logits, after those of the model."""
    later = mtp_labels(labels_BS, len(logits) - 1, boundary)
    pairs = zip(logits, [labels_BS, *later], strict=True)
    sums = [cross_entropy_sum(logits_BSV.flatten(0, 1), targets_BS.flatten()) for logits_BSV, targets_BS in pairs]
    return mtp_loss(ModelLosses(tuple(sums), records=()), later)


@settings(max_examples=40, deadline=None)
@given(labels(), st.integers(0, 3), st.sampled_from([BOUNDARY, None]), st.integers(0, 1000))
def test_the_loss_is_a_plain_sum(labels_BS: Tensor, modules: int, boundary: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*labels_BS.shape, VOCAB, dtype=torch.float64, generator=generator) for _ in range(modules)]
    total, targets = 0.0, 0
    for k, logits_BSV in enumerate(logits):
        for b, row in enumerate(labels_BS.tolist()):
            for i in range(len(row)):
                label = target_by_hand(row, i, k + 1, boundary)
                if label != IGNORE:
                    total -= logits_BSV[b, i].softmax(0)[label].log().item()
                    targets += 1
    found = loss_of([torch.zeros(*labels_BS.shape, VOCAB), *logits], labels_BS, boundary)
    assert found.loss_sum.item() == pytest.approx(total, rel=1e-12)
    assert (found.targets.item(), found.modules) == (targets, modules)
    assert found.mean_sum.item() == pytest.approx(total / max(modules, 1), rel=1e-12)
    assert found.sums.tolist() == [found.loss_sum.item(), targets]


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits_BSV = torch.zeros(1, 4, VOCAB, dtype=torch.bfloat16)
    found = loss_of([logits_BSV, logits_BSV], torch.zeros(1, 4, dtype=torch.int64), None)
    assert found.loss_sum.dtype == torch.float32
    assert found.loss_sum.item() == pytest.approx(3 * torch.tensor(float(VOCAB)).log().item(), rel=1e-6)


def test_the_last_places_have_no_target_and_no_gradient() -> None:
    model, tokens_BS = model_of(), text()
    output = model(tokens_BS)
    for logits_BSV in output.mtp_logits:
        logits_BSV.retain_grad()
    labels_BS = torch.cat([tokens_BS[:, 1:], torch.full((3, 1), IGNORE)], dim=1)
    found = loss_of([output.logits_BSV, *output.mtp_logits], labels_BS, None)
    found.loss_sum.backward()
    assert found.targets == 3 * (6 + 5)  # of eight tokens the third, or the fourth, is the first that a module predicts
    for k, logits_BSV in enumerate(output.mtp_logits):
        assert logits_BSV.grad is not None
        has_gradient_BS = logits_BSV.grad.abs().amax(dim=2) > 0
        assert has_gradient_BS.tolist() == [[i < 8 - 2 - k for i in range(8)]] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_sees_one_token_more_than_the_one_before_and_the_model_none(variant: str) -> None:
    model, tokens_BS = model_of(*VARIANTS[variant]), text()
    output = model(tokens_BS)
    for t in range(tokens_BS.shape[1]):
        changed_BS = tokens_BS.clone()
        changed_BS[:, t:] = (tokens_BS[:, t:] + 1 + torch.arange(8 - t)) % VOCAB
        changed = model(changed_BS)
        pairs = zip((changed.logits_BSV, *changed.mtp_logits), (output.logits_BSV, *output.mtp_logits), strict=True)
        for more, (after_BSV, before_BSV) in enumerate(pairs):
            change_S = (after_BSV - before_BSV).abs().amax(dim=(0, 2))
            first = max(0, t - more)  # the first place that may know of token t
            assert change_S[:first].tolist() == pytest.approx([0.0] * first, abs=1e-12), (t, more)
            assert change_S[first] > 1e-6, "it sees what it is told"


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_weight_zero_the_model_learns_as_without_modules(variant: str, lone_mesh: Mesh) -> None:
    """A module's router has balance losses of its own, which also shape what it reads: they have the weight, too."""
    found, expected = (
        gradients_of(Case(variant, (*VARIANTS[variant], f"model.mtp.depth={depth}")), lone_mesh) for depth in (2, 0)
    )
    own = {name for name in found if name.startswith("mtp.")}
    assert own
    assert found.keys() - own == expected.keys()
    assert [name for name in own if found[name].any()] == []
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_weight_every_module_and_the_shared_embedding_learn(variant: str, lone_mesh: Mesh) -> None:
    case = Case(variant, (*VARIANTS[variant], *OFF, *TWO))
    found, without = (gradients_of(case, lone_mesh, coef) for coef in (0.3, 0.0))
    assert [name for name, g in found.items() if name.startswith("mtp.") and not g.any()] == []
    shared = [name for name in ("embedding_VD", "head.weight", "norm.weight") if name in found]
    assert [name for name in shared if torch.equal(found[name], without[name])] == []


def gradients_of(case: Case, mesh: Mesh, coef: float = 0.0) -> dict[str, Tensor]:
    """After a step in two micro-batches."""
    model, batch = case.whole_model(), case.batches()[0]
    engine = TorchEngine(model, build_optimizer(model, case.config().optim), mesh)
    step = StepSettings(1e-2, None, seed=0, mtp_coef=coef, boundary_id=BOUNDARY)
    train_step(engine, mesh, rank_batches(batch, 0, 1, 2), batch[0].numel(), step)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_step_reports_nats_per_predicted_token(lone_mesh: Mesh) -> None:
    """Not per valid token, and whatever the weight."""
    case = Case("figure", (*TWO, *OFF), padding="uneven")
    model, (tokens_BS, labels_BS) = case.whole_model(), case.batches()[0]
    output = model(tokens_BS, replace(RoutingContext.of(tokens_BS), valid_BS=labels_BS != IGNORE))
    expected = loss_of([output.logits_BSV, *output.mtp_logits], labels_BS, BOUNDARY)
    engine = TorchEngine(model, build_optimizer(model, case.config().optim), lone_mesh)
    tokens = int((labels_BS != IGNORE).sum())
    step = StepSettings(1e-2, None, seed=0, mtp_coef=0.7, boundary_id=BOUNDARY)
    result = train_step(engine, lone_mesh, rank_batches((tokens_BS, labels_BS), 0, 1, 4), tokens, step)
    assert 0 < expected.targets < 2 * tokens
    figures = result.tally.measure(tokens, lone_mesh)
    assert figures["mtp_loss"] == pytest.approx(expected.loss_sum.item() / expected.targets.item(), rel=1e-12)


def test_evaluation_computes_no_module() -> None:
    model, tokens_BS = model_of(), text()
    expected_BSV = model.eval()(tokens_BS).logits_BSV
    for parameter in model.mtp.parameters():
        parameter.data.fill_(torch.nan)
    calls = []
    for module in model.mtp.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    output = model(tokens_BS)
    assert torch.equal(output.logits_BSV, expected_BSV)
    assert (output.mtp_logits, len(output.records), calls) == ((), 2, [])


def test_names_of_the_parameters() -> None:
    model = model_of("model.layers=1", "model.ffn.every=2")
    assert {name for name, _ in model.named_parameters() if name.startswith("mtp.0.")} == {
        f"mtp.0.{name}"
        for name in (
            "embedding_norm.weight", "hidden_norm.weight", "project.weight", "norm.weight",
            "block.attention_norm.weight", "block.attention.qkv.weight", "block.attention.out.weight",
            "block.ffn_norm.weight", "block.ffn.router.weight",
            "block.ffn.experts.gate_up_LDF2", "block.ffn.experts.down_LFD",
        )
    }  # fmt: skip
    assert "mtp.1.block.ffn.gate_up.weight" in dict(model.named_parameters()), "layer 2 of every second is dense"


def test_the_layers_of_modules_are_numbered_after_those_of_the_model() -> None:
    model = model_of("balance.loss_free.rate=0.1")
    assert list(model.moe_layers) == [0, 1, 2, 3]
    assert [model.moe_layers[depth] for depth in (2, 3)] == [module.block.ffn for module in model.mtp]
    assert list(model_of("model.ffn.every=2").moe_layers) == [1, 3]
    assert len(model(text()).records) == 4
    assert {name for name, _ in model.named_buffers()} >= {f"mtp.{k}.block.ffn.router.bias_E" for k in (0, 1)}


def test_padding_of_a_module_grows_with_its_distance() -> None:
    """Its router counts the places that have a token to predict, whatever documents end."""
    model, tokens_BS = model_of(), text()
    valid_BS = torch.arange(8) < torch.tensor([8, 5, 1]).unsqueeze(1)
    records = model(tokens_BS, RoutingContext.of(tokens_BS, valid_BS)).records
    assert [record.tokens.item() for record in records] == [14, 14, 7 + 4, 6 + 3]
    assert [record.counts_E.sum().item() for record in records] == [28, 28, 22, 18]


def test_a_second_forward_pass_has_the_same_records() -> None:
    """As recomputation needs, draws included."""
    model, tokens_BS = model_of("router.jitter=0.2", "router.expert_dropout=0.2", *VARIANTS["sinks"]), text()
    first, second = model(tokens_BS), model(tokens_BS)
    assert len(first.records) == 4
    for a, b in zip(first.records, second.records, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    for a_BSV, b_BSV in zip(first.mtp_logits, second.mtp_logits, strict=True):
        assert torch.equal(a_BSV, b_BSV)


def test_each_layer_ahead_draws_numbers_of_its_own() -> None:
    """With the same weights everywhere and nothing to tell places apart, only the draws differ."""
    model = model_of("router.jitter=0.9", "model.layers=1")
    seen = []
    for layer in model.moe_layers.values():
        layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[1].seed))
    model(text())
    assert len(set(seen)) == len(seen) == 3
