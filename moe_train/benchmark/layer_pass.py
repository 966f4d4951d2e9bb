"""A layer's forward and backward pass as a variant, and whether what it computes is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.benchmark.layer_case import LayerCase, LayerData
from moe_train.benchmark.layer_truth import agreement, best_experts, fullest_over_mean, relative_error, truth_of
from moe_train.benchmark.timing import Here, Timed


@dataclass(frozen=True)
class LayerPass:
    """One forward and one backward pass with a given gradient.

    Attributes:
        layer: from [1, T, D] to [1, T, D].
        parameters: whose gradients are made.
        x_BSD: [1, T, D]; its gradient is made, too.
        gradient_BSD: [1, T, D] of the output.
    """

    layer: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]
    x_BSD: Tensor
    gradient_BSD: Tensor

    @staticmethod
    def of(layer: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], data: LayerData) -> LayerPass:
        """Return the pass of a layer over a case's values."""
        return LayerPass(layer, tuple(parameters), data.x_BSD.clone().requires_grad_(), data.gradient_BSD)

    def __call__(self) -> Tensor:
        """Run it; the gradients of the last one are dropped first, as at the start of a step."""
        self.x_BSD.grad = None
        for parameter in self.parameters:
            parameter.grad = None
        y_BSD = self.layer(self.x_BSD)
        torch.autograd.backward(y_BSD, self.gradient_BSD)
        return y_BSD


@dataclass(frozen=True)
class Failing:
    """Stands for a variant that could not be built: the others can still be timed.

    Attributes:
        error: why not.
    """

    error: Exception

    def run_ms(self) -> float:
        """Raise it."""
        raise self.error


@dataclass(frozen=True)
class Candidate:
    """A layer under test.

    Attributes:
        run: its passes.
        router: the module that chooses experts; None: none does, or nobody asks.
        chosen_of: returns the experts [T, K], in any order, from what the router returned.
    """

    run: LayerPass
    router: nn.Module | None = None
    chosen_of: Callable[[Any], Tensor] | None = None

    def chosen_TK(self, case: LayerCase) -> Tensor | None:
        """Run one pass and return the experts [T, K] that it chose; None: unknown."""
        if self.router is None or self.chosen_of is None:
            self.run()
            return torch.zeros(case.tokens, 1, dtype=torch.int64) if case.experts == 1 else None
        decisions: list[Any] = []
        hook = self.router.register_forward_hook(lambda module, inputs, decision: decisions.append(decision))
        self.run()
        hook.remove()  # what is timed has no hook
        return self.chosen_of(decisions.pop()).to(torch.int64)


def variants_of(
    case: LayerCase, data: LayerData, makers: Mapping[str, Callable[[], Candidate]], checks: bool
) -> dict[str, Timed | float]:
    """Build candidates and check what they compute.

    Args:
        case: sizes.
        data: its values.
        makers: one per variant; one that raises makes a variant that tells why when it is run.
        checks: whether to compare with fp64: facts ``VARIANT:error y``, ``VARIANT:error dx``, how much of the routing
            is that of fp64 logits (``VARIANT:same routing``) and how skewed it is (``VARIANT:fullest/mean``).
    """
    made: dict[str, Timed | float] = {}
    for name, make in makers.items():
        try:
            candidate = make()
            facts = checked(case, data, candidate) if checks else {}
        except Exception as error:
            made[name] = Failing(error)
            continue
        made[name] = Here(candidate.run)
        made |= {f"{name}:{fact}": value for fact, value in facts.items()}
    return made


def checked(case: LayerCase, data: LayerData, candidate: Candidate) -> dict[str, float]:
    """Run a candidate once and compare with the same sums in fp64, by the routing that it chose itself."""
    chosen_TK = candidate.chosen_TK(case)
    if chosen_TK is None:
        return {}
    y_BSD, x_BSD = candidate.run(), candidate.run.x_BSD
    exact = truth_of(data, chosen_TK)
    assert x_BSD.grad is not None, "the pass makes it"
    facts = {
        "error y": relative_error(y_BSD.detach().reshape_as(exact.y_TD), exact.y_TD),
        "error dx": relative_error(x_BSD.grad.reshape_as(exact.dx_TD), exact.dx_TD),
    }
    if case.experts == 1:
        return facts
    facts["same routing"] = agreement(chosen_TK, best_experts(data, case.top_k))
    return {**facts, "fullest/mean": fullest_over_mean(chosen_TK, case.experts)}
