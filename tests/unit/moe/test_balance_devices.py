"""DeepSeek-V2's losses over devices: of the load, and of the tokens that devices receive (arXiv 2405.04434, 2.2.3)."""

import pytest
import torch
from routing_cases import V2, at_logits, balance_in_parts, ffn_of, random
from torch import Tensor

from moe_train.config.model import FFNConfig
from moe_train.moe.balance import Balance

EXPERTS, DEVICES, SIZE, LENGTH, BATCH = 12, 4, 3, 6, 4
TOKENS = BATCH * LENGTH
VALID_BS = torch.arange(LENGTH) < torch.tensor([[6], [2], [0], [5]])
SCOPES = ["global", "sequence", "micro"]


def layer(loss: str, scope: str = "global", top_k: int = 3, **router: object) -> FFNConfig:
    balance = {loss: {"scope": scope, "devices": DEVICES, "coef": 0.3}}
    return ffn_of(router.pop("kind", "topk"), EXPERTS, top_k, balance, **router)


LIMITED = {"kind": "group_limited", "groups": DEVICES, "top_groups": 2, **V2}


def textbook(loss: str, ffn: FFNConfig, z_TE: Tensor, groups: list[list[int]], most_visits: int) -> Tensor:
    """eq. 26 to 28 (device) or 29 to 31 (communication) for each group of tokens, weighted by their number."""
    experts_TK = at_logits(ffn, z_TE.detach()).experts_TK.tolist()
    total = z_TE.new_zeros(())
    for rows in groups:
        p_E = z_TE[rows].softmax(dim=1).mean(dim=0)
        for d in range(DEVICES):
            members = range(d * SIZE, (d + 1) * SIZE)
            if loss == "device":
                f = [EXPERTS / (ffn.top_k * len(rows)) * sum(e in experts_TK[t] for t in rows) for e in members]
                share = sum(f) / SIZE
            else:
                sent = sum(any(e in members for e in experts_TK[t]) for t in rows)
                share = DEVICES / (most_visits * len(rows)) * sent
            total = total + len(rows) * share * p_E[list(members)].sum()
    return total / sum(len(rows) for rows in groups)


def groups_of(scope: str, sizes: list[int], valid_BS: Tensor | None) -> list[list[int]]:
    """The valid tokens of each sequence, part, or the whole step."""
    valid_T = torch.ones(TOKENS, dtype=torch.bool) if valid_BS is None else valid_BS.flatten()
    edges = {"global": [TOKENS], "sequence": [LENGTH] * BATCH, "micro": [size * LENGTH for size in sizes]}
    parts = torch.arange(TOKENS).split(edges[scope])
    return [rows for part in parts if (rows := part[valid_T[part]].tolist())]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sizes", [[4], [1, 3]])
@pytest.mark.parametrize("valid_BS", [None, VALID_BS], ids=["full", "padded"])
@pytest.mark.parametrize("loss", ["device", "communication"])
@pytest.mark.parametrize(("router", "most_visits"), [({}, 3), (LIMITED, 2)], ids=["topk", "group_limited"])
def test_trap_9_value_and_gradient_are_those_of_the_textbook(
    loss: str, router: dict[str, object], most_visits: int, scope: str, sizes: list[int], valid_BS: Tensor | None
) -> None:
    ffn = layer(loss, scope, **router)
    z_TE = random(TOKENS, EXPERTS).requires_grad_()
    values, found_TE = balance_in_parts(ffn, z_TE, LENGTH, sizes, valid_BS)
    expected = textbook(loss, ffn, z_TE, groups_of(scope, sizes, valid_BS), most_visits)
    (expected_TE,) = torch.autograd.grad(0.3 * expected, z_TE)
    assert values[f"{loss}_loss"] == pytest.approx(expected.item(), abs=1e-13)
    assert torch.allclose(found_TE, expected_TE, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, EXPERTS])
def test_trap_11_balanced_load_of_devices_costs_exactly_one(top_k: int, scope: str) -> None:
    """The K experts from t on, cyclically, for as many tokens as there are experts."""
    z_TE = cyclic(lambda t: [(t + k) % EXPERTS for k in range(top_k)])
    values, _ = balance_in_parts(layer("device", scope, top_k), z_TE, EXPERTS, [1, 1])
    assert values["device_loss"] == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2, 3, DEVICES])
def test_trap_11_every_token_on_as_many_devices_as_it_may_costs_exactly_one(top_k: int, scope: str) -> None:
    """K choices on min(K, D) different devices, each device visited equally often."""
    z_TE = cyclic(lambda t: [((t + k) % DEVICES) * SIZE + t % SIZE for k in range(top_k)])
    values, _ = balance_in_parts(layer("communication", scope, top_k), z_TE, EXPERTS, [1, 1])
    assert values["communication_loss"] == pytest.approx(1.0, abs=1e-14)


def test_limited_to_two_groups_two_visits_per_token_are_balanced() -> None:
    z_TE = cyclic(lambda t: [(t % DEVICES) * SIZE, (t % DEVICES) * SIZE + 1, ((t + 1) % DEVICES) * SIZE])
    values, _ = balance_in_parts(layer("communication", **LIMITED), z_TE, EXPERTS, [1, 1])
    assert values["communication_loss"] == pytest.approx(1.0, abs=1e-14)


def test_all_choices_on_one_device_visit_it_once() -> None:
    """Tokens that stay together travel less: with even probabilities 1 / min(K, D) of the most."""
    z_TE = cyclic(lambda t: [(t % DEVICES) * SIZE + k for k in range(3)])
    values, _ = balance_in_parts(layer("communication"), z_TE, EXPERTS, [1, 1])
    assert values["communication_loss"] == pytest.approx(1 / 3, abs=1e-14)


@pytest.mark.parametrize(
    ("router", "top_k", "devices", "expected"),
    [({}, 2, 4, 2), ({}, 6, 4, 4), (LIMITED, 3, 4, 2), (LIMITED, 1, 4, 1), ({"kind": "sigmoid"}, 3, 2, 2)],
)
def test_most_visits(router: dict[str, object], top_k: int, devices: int, expected: int) -> None:
    assert Balance(layer("communication", top_k=top_k, **router)).most_visits(devices) == expected


def cyclic(chosen: object) -> Tensor:
    """Two sequences of E tokens, whose choices ``chosen(t)`` stand out equally over otherwise even scores."""
    z_TE = torch.zeros(2 * EXPERTS, EXPERTS, dtype=torch.float64)
    for t in range(2 * EXPERTS):
        for place, expert in enumerate(chosen(t % EXPERTS)):
            z_TE[t, expert] = 2.0 + 0.0 * place
    return z_TE
