"""Importance and load losses: coefficients of variation over the whole step, whatever parts it comes in."""

import operator
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import DIM, context_of, ffn_of, losses_of, random, record_of, router_of
from torch import Tensor, nn

from moe_train.config.model import FFNConfig
from moe_train.moe.balance import Balance, RoutingRecord
from moe_train.moe.losses import VariationLoss

EXPERTS, LENGTH, BATCH = 6, 5, 4
TOKENS = BATCH * LENGTH
NOISY = ffn_of("noisy_topk", EXPERTS, 2, {"importance_load": {"importance_coef": 0.3, "load_coef": 0.7}})
PLAIN = ffn_of("topk", EXPERTS, 2, {"importance_load": {"importance_coef": 0.3, "load_coef": 0.0}})


def cv_squared(v_E: Tensor) -> Tensor:
    """Var(v) / Mean(v)², the population's variance (Shazeer et al. 2017, eq. 7)."""
    mean = v_E.sum() / len(v_E)
    return ((v_E - mean) ** 2).sum() / len(v_E) / mean**2


def records_in_parts(
    ffn: FFNConfig, router: nn.Module, x_TD: Tensor, sizes: list[int], valid_BS: Tensor | None
) -> list[RoutingRecord]:
    records, first = [], 0
    for size in sizes:
        valid = None if valid_BS is None else valid_BS[first : first + size]
        context = context_of(size, LENGTH, seed=4, valid_BS=valid, first=first)
        records.append(record_of(ffn, router(x_TD[first * LENGTH :][: size * LENGTH], context), context))
        first += size
    return records


def textbook(ffn: FFNConfig, router: nn.Module, x_TD: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both losses on the whole batch at once, by autograd through the squares."""
    routing = router(x_TD, context_of(BATCH, LENGTH, seed=4, valid_BS=valid_BS))
    valid_T = torch.ones(TOKENS, dtype=torch.bool) if valid_BS is None else valid_BS.flatten()
    importance = [torch.zeros((), dtype=torch.float64)] * EXPERTS
    for t in valid_T.nonzero().flatten().tolist():
        for k, e in enumerate(routing.experts_TK[t].tolist()):
            importance[e] = importance[e] + routing.weights_TK[t, k]
    load_E = torch.ones(EXPERTS) if routing.load_TE is None else routing.load_TE[valid_T].sum(dim=0)
    return cv_squared(torch.stack(importance)), cv_squared(load_E)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([[4], [1, 3], [2, 2], [1, 1, 1, 1], [2, 1, 1]]), st.integers(0, 10**6), st.booleans())
def test_trap_9_the_gradient_in_parts_is_autograd_on_the_whole_batch(
    sizes: list[int], seed: int, is_padded: bool
) -> None:
    """A square of sums over all ranks and micro-batches: exact because every part takes the slope of the totals."""
    valid_BS = torch.arange(LENGTH) < torch.tensor([[5], [1], [0], [3]]) if is_padded else None
    num_valid = TOKENS if valid_BS is None else int(valid_BS.sum())
    for ffn in (NOISY, PLAIN):
        router, x_TD = router_of(ffn, training=True), random(TOKENS, DIM, seed=seed)
        records = records_in_parts(ffn, router, x_TD, sizes, valid_BS)
        totals = reduce(operator.add, [record.detached() for record in records]).statistics
        parameters = list(router.parameters())
        share = sum(Balance(ffn).share(record, totals) for record in records) / num_valid
        found = torch.autograd.grad(share, parameters, materialize_grads=True)
        importance, load = textbook(ffn, router, x_TD, valid_BS)
        weights = ffn.balance.importance_load
        loss = weights.importance_coef * importance + weights.load_coef * load
        expected = torch.autograd.grad(loss, parameters, materialize_grads=True)
        values = losses_of(ffn, records, num_valid)
        assert values["importance_loss"].item() == pytest.approx(importance.item(), rel=1e-10)
        if ffn is NOISY:
            assert values["load_loss"].item() == pytest.approx(load.item(), rel=1e-10)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_both_losses_train_the_noise_and_the_load_loss_alone_does_too() -> None:
    for coefs in ({"importance_coef": 0.0, "load_coef": 1.0}, {"importance_coef": 1.0, "load_coef": 0.0}):
        ffn = ffn_of("noisy_topk", EXPERTS, 2, {"importance_load": coefs})
        router = router_of(ffn, training=True)
        (record,) = records_in_parts(ffn, router, random(TOKENS, DIM), [BATCH], None)
        Balance(ffn).share(record, record.detached().statistics).backward()
        assert router.noise.grad.abs().max() > 1e-4
        assert router.weight.grad.abs().max() > 1e-4


def value_of(v_E: list[float], tokens: int = 4) -> float:
    loss = VariationLoss("importance_loss", 1.0, "importance")
    return loss.value(torch.tensor([float(tokens), *v_E], dtype=torch.float64)).item() / tokens


def test_equal_importance_costs_nothing() -> None:
    assert value_of([0.7] * 6) == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize("experts", [2, 4, 64])
def test_collapse_onto_one_expert_costs_one_less_than_the_experts(experts: int) -> None:
    assert value_of([3.0] + [0.0] * (experts - 1)) == pytest.approx(experts - 1, rel=1e-14)


def test_a_single_expert_costs_nothing() -> None:
    assert value_of([3.0]) == 0.0


def test_no_tokens_cost_nothing_and_have_a_finite_slope() -> None:
    loss = VariationLoss("importance_loss", 1.0, "importance")
    totals = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    value = loss.value(totals)
    value.backward()
    assert value.item() == 0.0
    assert totals.grad.isfinite().all()


def test_without_noise_the_load_is_a_count() -> None:
    """In evaluation, as the paper has it: hard counts, which carry no gradient."""
    router = router_of(NOISY)
    x_TD, context = random(TOKENS, DIM), context_of(BATCH, LENGTH)
    record = record_of(NOISY, router(x_TD, context), context, training=False)
    load_E = record.statistics[-1][1:]
    assert torch.equal(load_E, record.counts_E.double())
    assert not record.statistics[-1].requires_grad


def test_the_scale_of_the_weights_does_not_matter() -> None:
    """A ratio of deviation and mean."""
    values = []
    for scale in (1.0, 16.0):
        ffn = ffn_of("topk", EXPERTS, 2, {"importance_load": {"load_coef": 0.0}}, scale=scale)
        records = records_in_parts(ffn, router_of(ffn, training=True), random(TOKENS, DIM), [BATCH], None)
        values.append(losses_of(ffn, records, TOKENS)["importance_loss"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-13)
