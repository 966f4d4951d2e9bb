"""Load-balance and z-loss: exact values where they are known, their gradient, and that padding counts nowhere."""

import math
import operator
from functools import reduce

import pytest
import torch
from routing_cases import ROUTERS, at_logits, balance_in_parts, context_of, ffn_of, random, record_of, router_of
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.moe.balance import Balance, RoutingRecord
from moe_train.moe.losses import balance_sum

EXPERTS, LENGTH, BATCH = 8, 6, 4
TOKENS = BATCH * LENGTH
VALID_BS = torch.arange(LENGTH) < torch.tensor([[6], [2], [0], [5]])
SCOPES = ["global", "sequence", "micro"]
ALL_LOSSES = {
    "aux": {"coef": 0.3},
    "z_loss": {"coef": 0.1},
    "importance_load": {"load_coef": 0.0},
    "device": {"devices": 4},
    "communication": {"devices": 4},
}


def aux(scope: str, top_k: int = 2, coef: float = 0.01) -> FFNConfig:
    return ffn_of("topk", EXPERTS, top_k, {"aux": {"scope": scope, "coef": coef}}, normalize="none")


def spread(top_k: int, height: float = 2.0) -> Tensor:
    """Scores of two sequences in which each expert is chosen equally often: the K experts from t on, cyclically."""
    z_TE = torch.zeros(2 * EXPERTS, EXPERTS, dtype=torch.float64)
    for t in range(2 * EXPERTS):
        for k in range(top_k):
            z_TE[t, (t + k) % EXPERTS] = height
    return z_TE


def textbook(z_TE: Tensor, sizes: list[int], top_k: int, scope: str, valid_BS: Tensor | None = None) -> Tensor:
    """Switch, eq. 4 to 6, as it stands there: f as numbers, P as a mean, for each group of tokens of the scope."""
    valid_T = torch.ones(len(z_TE), dtype=torch.bool) if valid_BS is None else valid_BS.flatten()
    edges = {"global": [len(z_TE)], "sequence": [LENGTH] * (len(z_TE) // LENGTH), "micro": [s * LENGTH for s in sizes]}
    total = z_TE.new_zeros(())
    for rows in torch.arange(len(z_TE)).split(edges[scope]):
        rows = rows[valid_T[rows]]
        f_E = [0.0] * EXPERTS
        for t in rows.tolist():
            for e in z_TE[t].topk(top_k).indices.tolist():
                f_E[e] += 1 / (top_k * len(rows))
        mass_E = z_TE[rows].softmax(dim=1).sum(dim=0)
        total = total + EXPERTS * sum(f * mass for f, mass in zip(f_E, mass_E, strict=True))
    return total / valid_T.sum()


# --- known values ---


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, EXPERTS])
@pytest.mark.parametrize("kind", ["topk", "sigmoid", "noisy_topk"])
def test_trap_11_balanced_routing_costs_exactly_one(kind: str, top_k: int, scope: str) -> None:
    """For every K, before drops."""
    ffn = ffn_of(kind, EXPERTS, top_k, {"aux": {"scope": scope}})
    values, _ = balance_in_parts_of(ffn, spread(top_k))
    assert values["aux_loss"] == pytest.approx(1.0, abs=1e-14)


def balance_in_parts_of(ffn: FFNConfig, z_TE: Tensor) -> tuple[dict[str, float], Tensor]:
    if ffn.router.kind == "noisy_topk":
        context = context_of(2, EXPERTS)
        router = router_of(ffn, dim=EXPERTS)
        with torch.no_grad():
            router.weight.copy_(torch.eye(EXPERTS))
        record = record_of(ffn, router(z_TE, context), context)
        totals = Balance(ffn).values(record.statistics)
        return {name: value.item() / len(z_TE) for name, value in totals.items()}, z_TE
    return balance_in_parts(ffn, z_TE, EXPERTS, [1, 1])


@pytest.mark.parametrize("scope", SCOPES)
def test_collapse_onto_one_expert_costs_the_number_of_experts(scope: str) -> None:
    z_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    z_TE[:, 2] = 100.0
    values, _ = balance_in_parts(aux(scope, top_k=1), z_TE, LENGTH, [2, 2])
    assert values["aux_loss"] == pytest.approx(EXPERTS, abs=1e-12)


def test_the_loss_may_fall_below_one() -> None:
    """Load and probabilities may be against each other: nobody should assert the opposite."""
    counts_E, mass_E = torch.tensor([4, 0]), torch.tensor([1.2, 2.8], dtype=torch.float64)
    assert balance_sum(counts_E, mass_E).item() / 4 == pytest.approx(0.6)


def test_even_load_costs_one_whatever_the_probabilities_are_and_the_other_way_round() -> None:
    counts_E, mass_E = torch.tensor([5, 5, 5, 5]), torch.tensor([1.0, 7.0, 0.0, 2.0], dtype=torch.float64)
    assert balance_sum(counts_E, mass_E).item() == pytest.approx(10.0, abs=1e-14)
    assert balance_sum(torch.tensor([9, 1, 0, 3]), torch.full((4,), 2.5)).item() == pytest.approx(10.0, abs=1e-6)


# --- values and gradients against the textbook ---


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]])
@pytest.mark.parametrize("valid_BS", [None, VALID_BS], ids=["full", "padded"])
def test_trap_9_value_and_gradient_are_those_of_the_textbook(
    scope: str, sizes: list[int], valid_BS: Tensor | None
) -> None:
    """With the load of all parts: so for accumulation and data parallelism."""
    z_TE = random(TOKENS, EXPERTS).requires_grad_()
    values, found_TE = balance_in_parts(aux(scope, coef=0.3), z_TE, LENGTH, sizes, valid_BS)
    loss = textbook(z_TE, sizes, 2, scope, valid_BS)
    (expected_TE,) = torch.autograd.grad(0.3 * loss, z_TE)
    assert values["aux_loss"] == pytest.approx(loss.item(), abs=1e-13)
    assert torch.allclose(found_TE, expected_TE, rtol=0, atol=1e-15)


def test_the_global_loss_is_another_than_the_mean_over_parts() -> None:
    z_TE = random(TOKENS, EXPERTS)
    values = {scope: balance_in_parts(aux(scope), z_TE, LENGTH, [2, 2])[0]["aux_loss"] for scope in SCOPES}
    assert len({round(value, 4) for value in values.values()}) == 3


def test_trap_10_with_equal_counts_in_all_parts_the_global_loss_is_the_micro_loss() -> None:
    """Never a factor of the number of ranks between them."""
    z_TE = torch.cat([spread(2), spread(2, height=0.7)])
    both = [balance_in_parts(aux(scope), z_TE, EXPERTS, [2, 2]) for scope in ("global", "micro")]
    assert both[0][0]["aux_loss"] == pytest.approx(both[1][0]["aux_loss"], abs=1e-14)
    assert torch.allclose(both[0][1], both[1][1], rtol=0, atol=1e-17)


def test_the_gradient_flows_through_the_probabilities_only() -> None:
    """Nothing of f: the gradient is E·f_e/n through the softmax, exactly."""
    z_TE = random(TOKENS, EXPERTS)
    _, found_TE = balance_in_parts(aux("global", coef=1.0), z_TE, LENGTH, [4])
    experts_TK = z_TE.topk(2, dim=1).indices
    slope_E = EXPERTS * torch.bincount(experts_TK.flatten(), minlength=EXPERTS).double() / (2 * TOKENS) / TOKENS
    p_TE = z_TE.softmax(dim=1)
    expected_TE = p_TE * (slope_E - (p_TE * slope_E).sum(dim=1, keepdim=True))
    assert torch.allclose(found_TE, expected_TE, rtol=0, atol=1e-16)


@pytest.mark.parametrize("name", ["gshard", "gshard_sampled"])
def test_gshard_counts_first_choices_only(name: str) -> None:
    router = ROUTERS[name].router.model_dump(exclude={"kind"})
    ffn = ffn_of("gshard", EXPERTS, 2, {"aux": {"coef": 1.0}}, **router)
    z_TE = random(TOKENS, EXPERTS).requires_grad_()
    values, found_TE = balance_in_parts(ffn, z_TE, LENGTH, [1, 3])
    loss = textbook(z_TE, [1, 3], 1, "global")
    assert values["aux_loss"] == pytest.approx(loss.item(), abs=1e-13)
    assert torch.allclose(found_TE, torch.autograd.grad(loss, z_TE)[0], rtol=0, atol=1e-15)


def test_balanced_one_hot_routing_costs_one_by_gshard() -> None:
    values, _ = balance_in_parts(ffn_of("gshard", EXPERTS, 2, {"aux": {}}), spread(1, height=100.0), EXPERTS, [1, 1])
    assert values["aux_loss"] == pytest.approx(1.0, abs=1e-14)


def test_deepseek_v3_counts_the_choice_without_bias() -> None:
    """Sequence-wise loss, eq. 17 to 20: f of the un-biased top-K, P of scores over their sum."""
    ffn = ffn_of("group_limited", EXPERTS, 2, {"loss_free": {}, "aux": {"scope": "sequence", "coef": 1.0}})
    z_TE, bias_E = random(TOKENS, EXPERTS).requires_grad_(), random(EXPERTS, seed=1)
    context = context_of(BATCH, LENGTH)
    routing = at_logits(ffn, z_TE, context, True, bias_E)
    record = record_of(ffn, routing, context)
    expected = z_TE.new_zeros(())
    for z_SE in z_TE.split(LENGTH):
        s_SE = z_SE.sigmoid()
        count_E = torch.bincount(s_SE.topk(2, dim=1).indices.flatten(), minlength=EXPERTS)
        f_E = EXPERTS / (2 * LENGTH) * count_E.double()
        expected = expected + (f_E * (s_SE / s_SE.sum(dim=1, keepdim=True)).mean(dim=0)).sum() * LENGTH
    assert Balance(ffn).values(record.statistics)["aux_loss"].item() == pytest.approx(expected.item(), abs=1e-12)
    found_TE, expected_TE = (
        torch.autograd.grad(value, z_TE, retain_graph=True)[0]
        for value in (Balance(ffn).share(record, record.statistics), expected)
    )
    assert torch.allclose(found_TE, expected_TE, rtol=0, atol=1e-14)
    assert not torch.equal(record.counts_E, torch.bincount(routing.counted_TM.flatten(), minlength=EXPERTS))
    assert torch.equal(record.counts_E, torch.bincount(routing.experts_TK.flatten(), minlength=EXPERTS))


def test_z_loss_is_of_raw_scores() -> None:
    """Not of jittered probabilities, biased scores or noisy ones: logsumexp(x·Wg)²."""
    router = router_of(ffn_of("noisy_topk", EXPERTS, 2), training=True)
    x_TD, context = random(TOKENS, 6), context_of(BATCH, LENGTH)
    ffn = ffn_of("noisy_topk", EXPERTS, 2, {"z_loss": {}})
    record = record_of(ffn, router(x_TD, context), context)
    expected = (x_TD @ router.weight.T).logsumexp(dim=1).square().sum()
    assert Balance(ffn).values(record.statistics)["z_loss"].item() == pytest.approx(expected.item(), rel=1e-14)


def test_losses_have_their_weights() -> None:
    z_TE = random(TOKENS, EXPERTS)
    sections = {"aux": {"coef": 0.3}, "z_loss": {"coef": 0.7}, "device": {"coef": 0.2}, "communication": {"coef": 0.4}}
    together = balance_in_parts(ffn_of("topk", EXPERTS, 2, sections), z_TE, LENGTH, [2, 2])[1]
    alone = [
        balance_in_parts(ffn_of("topk", EXPERTS, 2, {name: {**fields, "coef": 1.0}}), z_TE, LENGTH, [2, 2])[1]
        for name, fields in sections.items()
    ]
    weighted = sum(fields["coef"] * gradient for fields, gradient in zip(sections.values(), alone, strict=True))
    assert torch.allclose(together, weighted, rtol=0, atol=1e-15)


def test_without_losses_nothing_is_added_but_both_are_measured() -> None:
    ffn = ffn_of("topk", EXPERTS, 2)
    values, gradient_TE = balance_in_parts(ffn, random(TOKENS, EXPERTS), LENGTH, [2, 2])
    assert not gradient_TE.any()
    assert values.keys() == {"aux_loss", "z_loss"}
    assert not Balance(ffn).needs_totals


@pytest.mark.parametrize(
    ("balance", "needed"),
    [
        ({"aux": {}}, True),
        ({"aux": {"scope": "sequence"}, "z_loss": {}, "device": {}, "communication": {}}, False),
        ({"aux": {"scope": "global", "coef": 0.0}}, False),
        ({"device": {"scope": "global"}}, True),
        ({"importance_load": {}}, True),
        ({"loss_free": {}}, False),
    ],
)
def test_totals_are_asked_for_only_when_a_gradient_depends_on_them(balance: dict[str, object], needed: bool) -> None:
    assert Balance(ffn_of("topk", EXPERTS, 2, balance)).needs_totals is needed


# --- what the record counts ---


def record(ffn: FFNConfig, x_TD: Tensor, batch: int, length: int, valid_BS: Tensor | None = None) -> RoutingRecord:
    context = context_of(batch, length, valid_BS=valid_BS)
    return record_of(ffn, router_of(ffn, training=True)(x_TD, context), context)


def with_balance(ffn: FFNConfig) -> FFNConfig:
    return ffn.model_copy(update={"balance": ffn_of("topk", EXPERTS, 2, ALL_LOSSES).balance})


@pytest.mark.parametrize("name", ROUTERS)
def test_trap_13_padding_counts_nowhere(name: str) -> None:
    """Every figure is that of the valid tokens alone."""
    ffn, x_TD = with_balance(ROUTERS[name]), random(TOKENS, 6)
    length = 4
    valid_BS = (torch.arange(LENGTH) < length).expand(BATCH, -1)
    polluted_TD = torch.where(valid_BS.reshape(-1, 1), x_TD, 1e3 * random(TOKENS, 6, seed=9))
    found = record(ffn, polluted_TD, BATCH, LENGTH, valid_BS)
    if name in ("noisy_topk", "gshard_sampled", "hash", "switch"):
        clean_TD = torch.where(valid_BS.reshape(-1, 1), x_TD, 0.0)  # what is drawn belongs to the place
        expected = record(ffn, clean_TD, BATCH, LENGTH, valid_BS)
    else:
        expected = record(ffn, x_TD.view(BATCH, LENGTH, 6)[:, :length].flatten(0, 1), BATCH, length)
    for a, b in zip(found.tensors(), expected.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_alone_costs_nothing(name: str) -> None:
    ffn = with_balance(ROUTERS[name])
    found = record(ffn, random(LENGTH, 6).requires_grad_(), 1, LENGTH, torch.zeros(1, LENGTH, dtype=torch.bool))
    assert all(not tensor.any() for tensor in found.tensors())
    assert all(value.item() == 0.0 for value in Balance(ffn).values(found.statistics).values())
    share = Balance(ffn).share(found, found.statistics)
    assert share.item() == 0.0


def test_padding_gets_no_gradient() -> None:
    z_TE = random(TOKENS, EXPERTS)
    ffn = ffn_of("topk", EXPERTS, 2, ALL_LOSSES)
    _, gradient_TE = balance_in_parts(ffn, z_TE, LENGTH, [2, 2], VALID_BS)
    assert not gradient_TE[~VALID_BS.flatten()].any()
    assert gradient_TE[VALID_BS.flatten()].abs().min(dim=1).values.min() > 0


def test_trap_11_load_is_counted_before_drops_and_drops_by_cause() -> None:
    """All tokens want experts 0 and 1, which have room for one in four."""
    z_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    z_TE[:, 0], z_TE[:, 1] = 2.0, 1.0
    context = context_of(BATCH, LENGTH)
    ffn = ffn_of("topk", EXPERTS, 2)
    capacities = {
        "dropped_capacity": {"kind": "factor", "factor": 1.0},
        "dropped_device": {"kind": "device", "factor": 0.5, "devices": 4, "exempt_fraction": 0.0},
    }
    for field, capacity in capacities.items():
        limited = FFNConfig.model_validate(ffn.model_dump() | {"capacity": capacity})
        found = record_of(limited, at_logits(limited, z_TE, context, True), context)
        assert found.counts_E.tolist() == [TOKENS, TOKENS] + [0] * (EXPERTS - 2)
        dropped = {name: getattr(found, name).item() for name in (*capacities, "dropped_router", "rerouted")}
        assert dropped.pop(field) > TOKENS
        assert not any(dropped.values())
        free = record_of(ffn, at_logits(ffn, z_TE, context, True), context)
        values = [Balance(ffn).values(r.statistics)["aux_loss"].item() for r in (found, free)]
        assert values[0] == values[1]


def test_what_the_router_gives_up_is_counted_as_chosen_and_dropped() -> None:
    ffn = ROUTERS["gshard_sampled"]
    context = context_of(BATCH, LENGTH, valid_BS=VALID_BS)
    routing = router_of(ffn, training=True)(random(TOKENS, 6), context)
    found = record_of(ffn, routing, context)
    assert found.counts_E.sum() == 2 * VALID_BS.sum()
    assert found.dropped_router == (routing.declined_TK & VALID_BS.view(-1, 1)).sum()
    assert 0 < found.dropped_router < VALID_BS.sum()
    assert found.dropped_capacity == found.dropped_device == 0


def test_expert_choice_counts_what_experts_took() -> None:
    found = record(ROUTERS["expert_choice"], random(TOKENS, 6), BATCH, LENGTH)
    assert found.counts_E.tolist() == [BATCH * max(1, LENGTH * 2 // EXPERTS)] * EXPERTS
    assert found.dropped_capacity == 0


def test_entropy_is_of_the_probabilities() -> None:
    even = record_of(
        ffn_of("topk", EXPERTS, 2), at_logits(ffn_of("topk", EXPERTS, 2), torch.zeros(6, EXPERTS)), context_of(1, 6)
    )
    assert even.entropy_sum.item() / 6 == pytest.approx(math.log(EXPERTS), rel=1e-6)
    sure = at_logits(ffn_of("topk", EXPERTS, 2), 1e4 * torch.eye(EXPERTS))
    assert record_of(ffn_of("topk", EXPERTS, 2), sure, context_of(1, EXPERTS)).entropy_sum.item() == 0.0


def test_trap_12_nothing_is_changed_in_place() -> None:
    """Counts and statistics are read again by metrics and by the bias after they went into a loss."""
    ffn = ffn_of("topk", EXPERTS, 2, ALL_LOSSES | {"loss_free": {}})
    parts = [record(ffn, random(LENGTH, 6, seed=seed), 1, LENGTH) for seed in (0, 1)]
    before = [[tensor.clone() for tensor in part.tensors()] for part in parts]
    total = reduce(operator.add, parts)
    for part in parts:
        Balance(ffn).share(part, total.statistics).backward(retain_graph=True)
    Balance(ffn).values(total.statistics)
    Balance(ffn).bias_change(total.counts_E)
    for part, kept in zip(parts, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part.tensors(), kept, strict=True))
