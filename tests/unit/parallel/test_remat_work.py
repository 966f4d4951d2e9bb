"""What the second pass does not do: attention's product, choices, and choices hidden inside of sums."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from layout_cases import NO_LOSS, PLAIN
from layouts import VOCAB
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.capacity import renormalized
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.routers import noisy
from moe_train.ops.topk import top_k
from moe_train.parallel.remat import Recomputed, Remat, apply_remat

CPU = torch.device("cpu")


class Ran(TorchDispatchMode):
    """Counts the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def model_with(mode: Remat) -> Transformer:
    config = PLAIN[0].config()
    model = PLAIN[0].prepare(build_model(config.model, VOCAB, LocalExchange(config.model.ffn.num_experts), "fp32", CPU))
    apply_remat(model, mode)
    return model


@pytest.mark.parametrize(("mode", "attended", "projected"), [("none", 2, 4), ("selective", 2, 6), ("full", 4, 6)])
def test_selective_attends_once(mode: Remat, attended: int, projected: int) -> None:
    """In each of two blocks, while its norm runs twice; the backward pass of experts makes their activations again."""
    tokens_BS, _ = PLAIN[0].batches()[0]
    with Ran() as ran:
        torch.autograd.backward(model_with(mode)(tokens_BS).logits_BSV.square().sum())
    products = {name: n for name, n in ran.calls.items() if "attention" in name and "backward" not in name}
    assert list(products.values()) == [attended]
    assert ran.calls["aten::silu"] == projected


def test_the_smooth_load_of_noisy_routers_keeps_its_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expert that was last in or first out in the forward pass is that one backwards, too."""
    asked: list[int] = []
    monkeypatch.setattr(noisy, "top_k", lambda x, k: asked.append(k) or top_k(x, k))
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def load(logits_TE: torch.Tensor) -> torch.Tensor:
        return noisy.smooth_load(logits_TE, logits_TE, logits_TE.exp(), logits_TE, 2)

    Recomputed(load)(logits_TE).square().sum().backward()
    assert asked == [3]
    assert NO_LOSS[3].config().model.ffn.router.kind == "noisy_topk"


def test_a_token_that_was_renormalised_is_so_backwards() -> None:
    """Though meanwhile what is kept of it weighs next to nothing."""
    weights_TK = torch.tensor([[0.75, 0.25]], dtype=torch.float64, requires_grad=True)
    kept_TK = torch.tensor([[True, False]])
    out_TK = Recomputed(renormalized)(weights_TK, torch.ones_like(kept_TK), kept_TK)
    weights_TK.data[0, 0] = 1e-20
    out_TK[0, 1].backward()
    assert weights_TK.grad is not None
    assert weights_TK.grad.abs().max() > 1e10  # by itself it would be left alone, with a gradient of 1
