"""In which order parts travel: each leg is begun before the experts work on the part ahead of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_train.moe.exchange.journey import Cargo, Journey, Transit


@dataclass
class Told:
    """A leg, or the way back of its rows, that tells what is done with it."""

    log: list[str]
    name: str

    def arrive(self):
        self.log.append(f"{self.name} arrives")
        rows = torch.zeros(1, 1)
        return rows if "home" in self.name else Cargo(rows, rows.long(), rows)

    def start_back(self, sums_RD: Tensor):
        return begun(self.log, f"{self.name} home")

    def end_back(self, parts_ND: Tensor) -> Tensor:
        return parts_ND


def begun(log: list[str], name: str) -> Told:
    log.append(f"{name} starts")
    return Told(log, name)


def order_of(num_parts: int, num_legs: int) -> list[str]:
    log: list[str] = []

    def ahead(part: int):
        return [lambda cargo, leg=leg: begun(log, f"{part}.{leg}") for leg in range(1, num_legs)]

    transit = Transit([Journey(begun(log, f"{part}.0"), 1, ahead(part)) for part in range(num_parts)])
    log.append("shared")
    for part, arrived in enumerate(transit):
        log.append(f"experts {part}")
        transit.send_home(arrived.rows_RD, arrived)
    assert transit.home().shape == (num_parts, 1)
    return log


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("num_legs", [1, 2])
def test_what_travels_while_experts_work(num_parts: int, num_legs: int) -> None:
    log = order_of(num_parts, num_legs)
    at = {event: place for place, event in enumerate(log)}
    assert len(at) == len(log) == 1 + num_parts * (1 + 4 * num_legs)
    for part in range(num_parts):
        assert at[f"{part}.0 starts"] < at["shared"] < at[f"{part}.0 arrives"]
        assert at[f"{part}.{num_legs - 1} arrives"] < at[f"experts {part}"]
        if part + 1 < num_parts:
            assert at[f"{part + 1}.{num_legs - 1} starts"] < at[f"experts {part}"], "the next is on its last leg"
            assert at[f"{part}.{num_legs - 1} home starts"] < at[f"experts {part + 1}"], "the last is on its way home"
        if part + 2 < num_parts:
            assert at[f"{part}.0 home starts"] < at[f"experts {part + 2}"], "on the slow leg, too"
        assert at[f"{part}.0 home arrives"] > at[f"experts {num_parts - 1}"], "nobody waits for it before that"


def test_tokens_of_another_layer_are_refused() -> None:
    rows = torch.zeros(1, 1)
    one, other = (Transit([Journey(Cargo(rows, rows.long(), rows), 1)]) for _ in range(2))
    (arrived,) = one
    with pytest.raises(AssertionError, match="did not come"):
        other.send_home(rows, arrived)
