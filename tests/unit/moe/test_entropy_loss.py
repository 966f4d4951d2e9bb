"""The entropy regulariser: its formula with all scopes, per head and in parts; its bounds; padding counts nowhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import at_logits, balance_in_parts, context_of, ffn_of, random
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.moe.balance import Balance
from moe_train.moe.losses import EntropyLoss, RoutedTokens

EXPERTS, LENGTH, BATCH = 6, 5, 4
VALID_BS = torch.arange(LENGTH) < torch.tensor([[5], [2], [0], [4]])
SCOPES = ["global", "sequence", "micro"]
EACH_SCOPE = pytest.mark.parametrize("scope", SCOPES)


def layer(scope: str = "global", coef: float = 1.0, kind: str = "sigmoid") -> FFNConfig:
    return ffn_of(kind, EXPERTS, 2, {"entropy": {"scope": scope, "coef": coef}}, normalize="none")


def textbook(z_TE: Tensor, groups: list[list[int]], heads: int = 1) -> Tensor:
    """sigma-MoE, eq. 20 and 21, for each group of tokens and each head's experts; a mean over all tokens."""
    total = z_TE.new_zeros(())
    for rows in groups:
        for own_TE in z_TE[rows].chunk(heads, dim=1) if rows else ():
            mean_E = sum(torch.exp(z_E) / torch.exp(z_E).sum() for z_E in own_TE) / len(rows)
            total = total + len(rows) * sum(p * torch.log(p) for p in mean_E)
    return total / sum(map(len, groups))


def groups_of(scope: str, valid_BS: Tensor, sizes: list[int]) -> list[list[int]]:
    """The valid tokens of each group; ``sizes`` are the sequences of each micro-batch."""
    runs = {"global": [BATCH], "sequence": [1] * BATCH, "micro": sizes}[scope]
    parts = torch.arange(BATCH * LENGTH).split([run * LENGTH for run in runs])
    return [[t for t in part.tolist() if valid_BS.flatten()[t]] for part in parts]


def measured(loss: EntropyLoss, z_TE: Tensor, valid_BS: Tensor) -> Tensor:
    """The mean loss of a batch in one piece."""
    context = context_of(BATCH, LENGTH, valid_BS=valid_BS)
    return loss.value(loss.measure(RoutedTokens(at_logits(layer(), z_TE, context), context))) / valid_BS.sum()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SCOPES), st.sampled_from([1, 2, 3]), st.booleans(), st.integers(0, 99), st.floats(0.1, 8.0))
def test_it_is_the_formula_and_so_is_its_gradient(
    scope: str, heads: int, padded: bool, seed: int, height: float
) -> None:
    z_TE = (height * random(BATCH * LENGTH, EXPERTS, seed=seed)).requires_grad_()
    valid_BS = VALID_BS if padded else torch.ones_like(VALID_BS)
    found = measured(EntropyLoss(1.0, scope, heads), z_TE, valid_BS)
    expected = textbook(z_TE, groups_of(scope, valid_BS, [BATCH]), heads)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (a,), (b,) = (torch.autograd.grad(value, z_TE) for value in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@EACH_SCOPE
def test_parts_on_ranks_and_micro_batches_have_the_gradient_of_the_whole(scope: str) -> None:
    """Of one rank's micro-batch alone the mean is another one, and that is what its scope says."""
    z_TE, sizes = random(BATCH * LENGTH, EXPERTS), [1, 2, 1]
    expected_TE = z_TE.clone().requires_grad_()
    value = 0.7 * textbook(expected_TE, groups_of(scope, VALID_BS, sizes))
    (wanted_TE,) = torch.autograd.grad(value, expected_TE)
    values, gradient_TE = balance_in_parts(layer(scope, 0.7), z_TE, LENGTH, sizes, VALID_BS)
    torch.testing.assert_close(gradient_TE, wanted_TE, rtol=1e-9, atol=1e-13)
    assert 0.7 * values["entropy_loss"] == pytest.approx(value.item(), rel=1e-12)


def test_it_is_least_when_the_mean_is_even_however_sure_each_token_is() -> None:
    valid_BS = torch.ones_like(VALID_BS)
    sure_TE = 60.0 * torch.eye(EXPERTS, dtype=torch.float64).repeat(BATCH * LENGTH // EXPERTS + 1, 1)
    even = measured(EntropyLoss(1.0, "global"), sure_TE[:18].repeat(2, 1)[: BATCH * LENGTH], valid_BS)
    alike = measured(EntropyLoss(1.0, "global"), sure_TE[:1].repeat(BATCH * LENGTH, 1), valid_BS)
    assert -math.log(EXPERTS) <= even.item() < -math.log(EXPERTS) + 0.01  # 20 tokens on 6 experts: nearly even
    assert abs(alike.item()) < 1e-9, "one expert has all"
    flat = measured(EntropyLoss(1.0, "global"), torch.zeros(BATCH * LENGTH, EXPERTS).double(), valid_BS)
    assert flat.item() == pytest.approx(-math.log(EXPERTS), abs=1e-12)


@EACH_SCOPE
def test_nobody_valid_costs_nothing_and_has_no_nan(scope: str) -> None:
    z_TE = random(BATCH * LENGTH, EXPERTS).requires_grad_()
    context = context_of(BATCH, LENGTH, valid_BS=torch.zeros_like(VALID_BS))
    loss = EntropyLoss(1.0, scope)
    value = loss.value(loss.measure(RoutedTokens(at_logits(layer(), z_TE, context), context)))
    assert float(value.detach()) == 0.0
    (gradient_TE,) = torch.autograd.grad(value, z_TE)
    assert (gradient_TE == 0).all()


def test_descent_spreads_the_load() -> None:
    """The sign: less loss must mean more balance."""
    z_TE = (random(BATCH * LENGTH, EXPERTS) + torch.linspace(2.0, -2.0, EXPERTS)).requires_grad_()
    valid_BS, spreads = torch.ones_like(VALID_BS), []
    for _ in range(3):
        mean_E = z_TE.detach().softmax(dim=1).mean(dim=0)
        spreads.append(float(mean_E.max() - mean_E.min()))
        (gradient_TE,) = torch.autograd.grad(measured(EntropyLoss(1.0, "global"), z_TE, valid_BS), z_TE)
        z_TE = (z_TE.detach() - 10.0 * gradient_TE).requires_grad_()
    assert spreads[0] > spreads[1] > spreads[2]


def test_a_layer_has_it_only_when_asked_and_heads_have_nothing_else() -> None:
    def names(balance: Balance) -> dict[str, float]:
        return {loss.name: loss.coef for loss in balance.losses}

    assert "entropy_loss" not in names(Balance(ffn_of("topk", EXPERTS, 2)))
    assert names(Balance(layer(coef=0.3)))["entropy_loss"] == 0.3
    assert names(Balance(layer(coef=0.3), heads=2)) == {"entropy_loss": 0.3}
    assert names(Balance(ffn_of("sigmoid", EXPERTS, 2), heads=2)) == {"entropy_loss": 0.0}
    assert [Balance(layer(scope)).needs_totals for scope in SCOPES] == [True, False, False]
    assert not Balance(layer(coef=0.0)).needs_totals
