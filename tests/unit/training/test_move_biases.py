"""The biases of loss-free balancing move once per optimizer step, by what all its micro-batches counted."""

import pytest
import torch
from layouts import VOCAB, Case, rank_batches
from torch import Tensor

from moe_train.dist.mesh import Mesh
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.parallel.engine import TorchEngine
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

RATE = 0.125
BIASED = Case("loss-free", ("router.kind=sigmoid", f"balance.loss_free.rate={RATE}"))
MIXED = Case("one MoE layer of two", (*BIASED.overrides, "model.ffn.every=2"))


def one_step(
    mesh: Mesh, accumulation: int, case: Case = BIASED, moves_biases: bool = True
) -> tuple[Transformer, list[Tensor]]:
    """The model after a step, and its layers' counts."""
    config = case.config()
    exchange = LocalExchange(config.model.ffn.num_experts)
    model = case.prepare(build_model(config.model, VOCAB, exchange, "fp64", torch.device("cpu")))
    engine = TorchEngine(model, build_optimizer(model, config.optim), mesh)
    batch = case.batches()[0]
    tokens = batch[0].numel()
    step_settings = StepSettings(1e-2, 0.5, seed=0, moves_biases=moves_biases)
    result = train_step(engine, mesh, rank_batches(batch, 0, 1, accumulation), tokens, step_settings)
    return model, [record.counts_E for record in result.tally.records]


def biases_of(model: Transformer) -> list[Tensor]:
    return [layer.router.bias_E for layer in model.moe_layers.values()]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trap_16_one_update_per_step_from_the_summed_counts(lone_mesh: Mesh, accumulation: int) -> None:
    model, counts = one_step(lone_mesh, accumulation)
    for bias_E, counts_E in zip(biases_of(model), counts, strict=True):
        assert counts_E.sum() == 2 * BIASED.batches()[0][0].numel(), "each token once, not once per forward pass"
        mean = counts_E.double().mean()
        assert torch.equal(bias_E, RATE * torch.sign(mean - counts_E)), "not several updates, not of the last part"
        assert bias_E.abs().max() == RATE


def test_accumulation_does_not_change_the_update(lone_mesh: Mesh) -> None:
    results = [biases_of(one_step(lone_mesh, accumulation)[0]) for accumulation in (1, 2, 4)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_trap_18_evaluation_leaves_the_biases_alone(lone_mesh: Mesh) -> None:
    model, _ = one_step(lone_mesh, 1)
    before = [bias_E.clone() for bias_E in biases_of(model)]
    model.eval()
    tokens_BS = BIASED.batches()[1][0]
    with torch.no_grad():
        model(tokens_BS, RoutingContext.of(tokens_BS))
    assert all(torch.equal(a, b) for a, b in zip(biases_of(model), before, strict=True))


def test_the_optimizer_does_not_know_the_biases(lone_mesh: Mesh) -> None:
    """Neither decay nor clipping may move them."""
    model, _ = one_step(lone_mesh, 1)
    optimizer = build_optimizer(model, BIASED.config().optim)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not any(id(bias_E) in held for bias_E in biases_of(model))
    assert held == {id(parameter) for parameter in model.parameters()}


def test_trap_19_a_dense_layer_beside_does_not_stop_the_update(lone_mesh: Mesh) -> None:
    model, _ = one_step(lone_mesh, 1, MIXED)
    assert [bias_E.abs().max().item() for bias_E in biases_of(model)] == [RATE]


def test_frozen_biases_stay_while_the_rest_learns(lone_mesh: Mesh) -> None:
    """So DeepSeek-V3 ended its training: with a rate of zero."""
    moved, frozen = (one_step(lone_mesh, 2, moves_biases=moves)[0] for moves in (True, False))
    assert not any(bias_E.any() for bias_E in biases_of(frozen))
    assert all(bias_E.any() for bias_E in biases_of(moved))
    for (name, a), b in zip(moved.named_parameters(), frozen.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} learned the same"


def test_the_bias_of_a_module_of_multi_token_prediction_moves_by_its_own_tokens(lone_mesh: Mesh) -> None:
    case = Case("loss-free, further ahead", (*BIASED.overrides, "model.mtp.depth=1"))
    model, counts = one_step(lone_mesh, 1, case)
    assert len(biases_of(model)) == len(counts) == 3
    sequences, length = case.batches()[0][0].shape
    assert [counts_E.sum().item() for counts_E in counts] == [2 * sequences * n for n in (length, length, length - 1)]
    for bias_E, counts_E in zip(biases_of(model), counts, strict=True):
        assert torch.equal(bias_E, RATE * torch.sign(counts_E.double().mean() - counts_E))
