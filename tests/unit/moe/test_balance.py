"""Balance losses: exact values where they are known, where gradient flows, and that padding counts nowhere."""

import dataclasses
import math

import pytest
import torch
from moe_samples import routing_of
from torch import Tensor

from moe_train.config.schema import AuxLossConfig, BalanceConfig, DroplessConfig, ZLossConfig
from moe_train.moe.balance import Balance, RoutingRecord, balance_sum
from moe_train.moe.capacity import Capacity

EXPERTS, LENGTH = 4, 8


def record_of(logits_TE: Tensor, top_k: int, valid_BS: Tensor | None = None, length: int = LENGTH) -> RoutingRecord:
    routing = routing_of(logits_TE, top_k)
    plan = Capacity(DroplessConfig(), logits_TE.shape[1], top_k).plan(routing, valid_BS, length, training=True)
    return RoutingRecord.of(routing, plan, valid_BS, length)


def aux_per_token(record: RoutingRecord, scope: str, tokens: int) -> Tensor:
    balance = Balance(BalanceConfig(aux=AuxLossConfig.model_validate({"scope": scope})))
    return balance.aux_sum(record, record.counts_E) / tokens


def random_logits(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def balanced_logits(top_k: int) -> Tensor:
    """Two sequences in which each expert is chosen equally often: the K experts from t on, cyclically."""
    z_TE = torch.zeros(2 * LENGTH, EXPERTS, dtype=torch.float64)
    for t in range(2 * LENGTH):
        for k in range(top_k):
            z_TE[t, (t + k) % EXPERTS] = 2.0
    return z_TE


@pytest.mark.parametrize("scope", ["global", "sequence"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_balanced_routing_costs_exactly_one(top_k: int, scope: str) -> None:
    record = record_of(balanced_logits(top_k), top_k)
    assert record.counts_E.tolist() == [2 * LENGTH * top_k // EXPERTS] * EXPERTS
    assert aux_per_token(record, scope, 2 * LENGTH).item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_collapse_onto_one_expert_costs_the_number_of_experts(scope: str) -> None:
    z_TE = torch.zeros(2 * LENGTH, EXPERTS, dtype=torch.float64)
    z_TE[:, 2] = 100.0
    assert aux_per_token(record_of(z_TE, 1), scope, 2 * LENGTH).item() == pytest.approx(EXPERTS, abs=1e-12)


def test_z_loss_of_zero_logits_is_the_squared_log_of_the_experts() -> None:
    record = record_of(torch.zeros(LENGTH, EXPERTS, dtype=torch.float64), 2)
    assert record.z_sum.item() / LENGTH == pytest.approx(math.log(EXPERTS) ** 2, abs=1e-14)
    assert record.entropy_sum.item() / LENGTH == pytest.approx(math.log(EXPERTS), abs=1e-14)


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_gradient_flows_through_the_probabilities_only(scope: str) -> None:
    z_TE = random_logits(2 * LENGTH).requires_grad_()
    record = record_of(z_TE, 2)
    (found_TE,) = torch.autograd.grad(aux_per_token(record, scope, 2 * LENGTH), z_TE)
    # The textbook loss with its load f written in as numbers.
    probabilities_BSE = z_TE.softmax(dim=1).view(2, LENGTH, EXPERTS)
    chosen_BSK = z_TE.detach().view(2, LENGTH, EXPERTS).topk(2, dim=2).indices
    counts_BE = torch.stack([torch.bincount(chosen_SK.flatten(), minlength=EXPERTS) for chosen_SK in chosen_BSK])
    f_BE = counts_BE / (2 * LENGTH) if scope == "sequence" else (counts_BE.sum(0) / (4 * LENGTH)).expand(2, -1)
    loss = (EXPERTS * (f_BE * probabilities_BSE.mean(dim=1)).sum(dim=1)).mean()
    (expected_TE,) = torch.autograd.grad(loss, z_TE)
    assert torch.allclose(found_TE, expected_TE, rtol=0, atol=1e-14)


def test_parts_of_a_batch_add_up_when_the_load_is_global() -> None:
    """What makes the loss exact under data parallelism and accumulation (linear in P at a fixed f)."""
    z_TE = random_logits(4 * LENGTH)
    whole = record_of(z_TE, 2)
    parts = [record_of(part_TE, 2) for part_TE in z_TE.split(LENGTH)]
    assert torch.equal(sum(part.counts_E for part in parts), whole.counts_E)
    total = sum(balance_sum(whole.counts_E, part.probability_sum_E) for part in parts)
    assert torch.allclose(total, balance_sum(whole.counts_E, whole.probability_sum_E), rtol=0, atol=1e-12)
    alone = sum(balance_sum(part.counts_E, part.probability_sum_E) for part in parts)
    assert abs(alone - total) > 1e-3, "with the load of each part alone it would be another loss"


def test_a_sequence_alone_is_its_own_batch() -> None:
    z_TE = random_logits(3 * LENGTH)
    alone = [aux_per_token(record_of(part_TE, 2), "global", 1) for part_TE in z_TE.split(LENGTH)]
    together = aux_per_token(record_of(z_TE, 2), "sequence", 1)
    assert torch.allclose(together, torch.stack(alone).sum(), rtol=0, atol=1e-12)


def test_padding_counts_nowhere() -> None:
    z_TE = random_logits(2 * LENGTH).view(2, LENGTH, EXPERTS)
    valid_BS = torch.ones(2, LENGTH, dtype=torch.bool)
    valid_BS[:, 5:] = False
    padded = z_TE.clone()
    padded[:, 5:] = 1e3 * torch.randn(2, 3, EXPERTS, dtype=torch.float64)
    found = record_of(padded.flatten(0, 1), 2, valid_BS)
    expected = record_of(z_TE[:, :5].flatten(0, 1), 2, length=5)
    for name, value in vars(expected).items():
        assert torch.allclose(getattr(found, name), value, rtol=0, atol=1e-12), name


def test_padding_gets_no_gradient() -> None:
    z_TE = random_logits(LENGTH).requires_grad_()
    valid_BS = torch.arange(LENGTH).unsqueeze(0) < 5
    record = record_of(z_TE, 2, valid_BS)
    loss = Balance(BalanceConfig()).loss_sum(record, record.counts_E) + record.sequence_balance_sum
    (gradient_TE,) = torch.autograd.grad(loss, z_TE)
    assert torch.equal(gradient_TE[5:], torch.zeros(3, EXPERTS, dtype=torch.float64))
    assert gradient_TE[:5].abs().min(dim=1).values.min() > 0


def test_padding_alone_costs_nothing() -> None:
    record = record_of(random_logits(LENGTH), 2, torch.zeros(1, LENGTH, dtype=torch.bool))
    for name, value in vars(record).items():
        assert not value.any(), name
    assert Balance(BalanceConfig()).loss_sum(record, record.counts_E).item() == 0.0


def test_weights_of_the_losses() -> None:
    record = record_of(random_logits(LENGTH), 2)
    aux, z = balance_sum(record.counts_E, record.probability_sum_E), record.z_sum
    config = BalanceConfig(aux=AuxLossConfig(coef=0.3), z_loss=ZLossConfig(coef=0.7))
    assert torch.allclose(Balance(config).loss_sum(record, record.counts_E), 0.3 * aux + 0.7 * z)
    neither = Balance(BalanceConfig(aux=None, z_loss=None))
    assert neither.loss_sum(record, record.counts_E).item() == 0.0
    assert not neither.needs_global_counts


def test_load_is_counted_before_drops() -> None:
    z_TE = torch.zeros(LENGTH, EXPERTS, dtype=torch.float64)  # all ties: everybody chooses expert 0
    routing = routing_of(z_TE, 1)
    plan = Capacity(DroplessConfig(), EXPERTS, 1).plan(routing, None, LENGTH, training=True)
    dropped = dataclasses.replace(plan, kept_TK=torch.arange(LENGTH).unsqueeze(1) < 3)
    record = RoutingRecord.of(routing, dropped, None, LENGTH)
    assert record.counts_E.tolist() == [LENGTH, 0, 0, 0]
    assert record.dropped.item() == LENGTH - 3
