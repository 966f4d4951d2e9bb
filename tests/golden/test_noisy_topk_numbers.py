"""Noisy top-k gating at given noise, computed by exact arithmetic outside this project (Shazeer et al. 2017)."""

import pytest
import torch
from routing_cases import context_of, ffn_of, losses_of, record_of
from torch import Tensor, nn

from moe_train.moe.balance import RoutingRecord
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.routers import build_router
from moe_train.moe.routing import Routing

X_TD = torch.tensor([[1, -1], [0.5, 2]], dtype=torch.float64)
WEIGHT_DE = torch.tensor([[0.3, -0.2, 0.5, 0.1], [0, 0.4, -0.1, 0.2]], dtype=torch.float64)
NOISE_DE = torch.tensor([[0.1, 0.2, -0.3, 0], [0.2, -0.1, 0.1, 0.3]], dtype=torch.float64)
EPS_TE = torch.tensor([[0.5, -1, 0.25, 0], [-0.5, 1, 0, 0.75]], dtype=torch.float64)

GATES_TE = [[0.47351095312994956, 0, 0.5264890468700504, 0], [0, 0.5290374632261649, 0, 0.4709625367738351]]
IMPORTANCE_E = [0.4735109531, 0.5290374632, 0.5264890469, 0.4709625368]
IMPORTANCE_CV2 = 0.003089687749389211
IMPORTANCE_CV2_UNBIASED = 0.004119583665852281
"""With the variance of a sample, E / (E - 1) times as large: what a popular port computes."""
CHANCES_TE = [
    [0.7326132259, 0.0762795400, 0.9137920184, 0.0963263558],
    [0.1265231652, 0.8434396505, 0.0505254299, 0.6500837732],
]
LOAD_E = [0.8591363911, 0.9197191906, 0.9643174483, 0.7464101290]
LOAD_CV2 = 0.008782746294613668

FFN = ffn_of("noisy_topk", 4, 2, {"importance_load": {}})
CONTEXT = context_of(1, 2)


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> Routing:
    """The router's decisions; the noise comes as the uniform numbers whose normal quantiles it is."""

    def uniform(self: RoutingContext, purpose: Purpose, num: int) -> Tensor:
        assert (purpose, num) == (Purpose.NOISE, 4)
        return torch.special.ndtr(EPS_TE)

    monkeypatch.setattr(RoutingContext, "uniform", uniform)
    router = build_router(FFN, 2, init_std=1.0).double().train()
    router.weight, router.noise = nn.Parameter(WEIGHT_DE.T.contiguous()), nn.Parameter(NOISE_DE.T.contiguous())
    decided: Routing = router(X_TD, CONTEXT)
    return decided


@pytest.fixture
def record(routing: Routing) -> RoutingRecord:
    return record_of(FFN, routing, CONTEXT)


def test_gates(routing: Routing) -> None:
    gates_TE = torch.zeros(2, 4, dtype=torch.float64).scatter(1, routing.experts_TK, routing.weights_TK)
    for found, expected in zip(gates_TE.tolist(), GATES_TE, strict=True):
        assert found == pytest.approx(expected, abs=1e-15)
    assert routing.experts_TK.tolist() == [[2, 0], [1, 3]], "best first"
    assert (gates_TE > 0).sum(dim=1).tolist() == [2, 2], "exactly k nonzeros"
    assert gates_TE.sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-15)


def test_chances_of_being_chosen(routing: Routing) -> None:
    for found, expected in zip(routing.load_TE.tolist(), CHANCES_TE, strict=True):
        assert found == pytest.approx(expected, abs=5e-11)


def test_importance_and_load(routing: Routing, record: RoutingRecord) -> None:
    gates_TE = torch.zeros(2, 4, dtype=torch.float64).scatter(1, routing.experts_TK, routing.weights_TK)
    assert gates_TE.sum(dim=0).tolist() == pytest.approx(IMPORTANCE_E, abs=5e-11)
    assert routing.load_TE.sum(dim=0).tolist() == pytest.approx(LOAD_E, abs=1e-10)
    importance, load = record.statistics[-2:]
    assert importance[1:].tolist() == pytest.approx(IMPORTANCE_E, abs=5e-11)
    assert load[1:].tolist() == pytest.approx(LOAD_E, abs=1e-10)


def test_squared_coefficients_of_variation(record: RoutingRecord) -> None:
    losses = losses_of(FFN, [record], 2)
    assert losses["importance_loss"].item() == pytest.approx(IMPORTANCE_CV2, abs=1e-16)
    assert losses["importance_loss"].item() * 4 / 3 == pytest.approx(IMPORTANCE_CV2_UNBIASED, abs=1e-16)
    assert losses["load_loss"].item() == pytest.approx(LOAD_CV2, abs=1e-15)
