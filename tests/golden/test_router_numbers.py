"""Numbers of one fixture, computed by exact arithmetic outside this project from the formulas of the papers."""

import math

import pytest
import torch
from routing_cases import at_logits, context_of, ffn_of, losses_of, record_of
from torch import Tensor

from moe_train.moe.losses import balance_sum

LOGITS_TE = torch.tensor([[2, 1, 0, -1], [0, 1, 2, -1], [1, 1.5, 0, 0], [3, 0, 0, 0]], dtype=torch.float64)
SWITCH_LOSS = 1.4201107672254563
"""Switch Transformer, eq. 4 with alpha = 1: top-1."""
TOP_2_LOSS = 1.3085671449722773
"""The same for top-2, f a share of the assignments (1.0 when balanced), at the source's load: the second choice of row
3 is a tie, which torch.topk happened to give to expert 2."""
TOP_2_LOAD = [3, 3, 2, 0]
TOP_2_UNDIVIDED = 2.6171342899445547
"""The same with f per token instead of per assignment, as in Hugging Face's Mixtral: K times as large."""
TOP_2_LOSS_LOWEST = 1.323711234823097
"""The same as TOP_2_LOSS where the tie goes to the lowest index, expert 1: the rule of this project."""
Z_LOSS = 6.672129469334688
"""ST-MoE, eq. 5, unweighted."""
MIXTRAL_WEIGHTS = [0.7310585786300049, 0.2689414213699951]
"""Row 0: softmax over the two selected logits, 2 and 1: 1 / (1 + 1/e) and 1 / (1 + e)."""
SWITCH_WEIGHTS = [0.6439142599, 0.2368828181]
"""Row 0 without renormalisation, to the ten digits of the source."""


def losses(top_k: int, scope: str) -> dict[str, Tensor]:
    ffn = ffn_of("topk", 4, top_k, {"aux": {"scope": scope}, "z_loss": {}}, normalize="none")
    context = context_of(1, 4)
    return losses_of(ffn, [record_of(ffn, at_logits(ffn, LOGITS_TE, context), context)], 4)


@pytest.mark.parametrize("scope", ["global", "sequence", "micro"])
@pytest.mark.parametrize(("top_k", "expected"), [(1, SWITCH_LOSS), (2, TOP_2_LOSS_LOWEST)])
def test_load_balance_loss(top_k: int, expected: float, scope: str) -> None:
    assert losses(top_k, scope)["aux_loss"].item() == pytest.approx(expected, abs=1e-12)


def test_load_balance_loss_of_the_switch_router() -> None:
    ffn, context = ffn_of("switch", 4, 1, {"aux": {}}), context_of(1, 4)
    record = record_of(ffn, at_logits(ffn, LOGITS_TE, context), context)
    assert losses_of(ffn, [record], 4)["aux_loss"].item() == pytest.approx(SWITCH_LOSS, abs=1e-12)


def test_load_balance_loss_at_a_given_load() -> None:
    mass_E = LOGITS_TE.softmax(dim=1).sum(dim=0)
    found = balance_sum(torch.tensor(TOP_2_LOAD), mass_E).item() / 4
    assert found == pytest.approx(TOP_2_LOSS, abs=1e-12)
    assert 2 * found == pytest.approx(TOP_2_UNDIVIDED, abs=1e-12)


def test_z_loss() -> None:
    assert losses(2, "global")["z_loss"].item() == pytest.approx(Z_LOSS, abs=1e-12)


@pytest.mark.parametrize("kind", ["topk", "topk_softmax", "gshard"])
def test_mixtral_weights(kind: str) -> None:
    """The last two are the first in exact arithmetic; GShard's sum has 1e-9 added."""
    weights_TK = at_logits(ffn_of(kind, 4, 2), LOGITS_TE).weights_TK
    tolerance = 2e-9 if kind == "gshard" else 1e-15
    assert weights_TK[0].tolist() == pytest.approx(MIXTRAL_WEIGHTS, abs=tolerance)
    assert MIXTRAL_WEIGHTS[0] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-15)


def test_switch_weights() -> None:
    weights_TK = at_logits(ffn_of("topk", 4, 2, normalize="none"), LOGITS_TE).weights_TK
    assert weights_TK[0].tolist() == pytest.approx(SWITCH_WEIGHTS, abs=1e-10)


@pytest.mark.parametrize(("experts", "expected"), [(8, 4.3241), (64, 17.2963), (128, 23.5422), (256, 30.7490)])
def test_z_loss_at_zero_logits(experts: int, expected: float) -> None:
    """(ln E)², not 0: what a router that knows nothing pays."""
    ffn, context = ffn_of("topk", experts, 2, {"z_loss": {}}), context_of(1, 3)
    routing = at_logits(ffn, torch.zeros(3, experts, dtype=torch.float64), context)
    found = losses_of(ffn, [record_of(ffn, routing, context)], 3)["z_loss"].item()
    assert found == pytest.approx(expected, abs=5e-5)
    assert found == pytest.approx(math.log(experts) ** 2, rel=1e-14)
