"""What a layer should compute: the same sums in fp64, one expert after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.benchmark.layer_case import LayerData


@dataclass(frozen=True)
class Truth:
    """Output and gradient, fp64.

    Attributes:
        y_TD: [T, D] output.
        dx_TD: [T, D] gradient of the tokens, that through the router included.
    """

    y_TD: Tensor
    dx_TD: Tensor


def truth_of(data: LayerData, chosen_TK: Tensor) -> Truth:
    """Compute a layer in fp64.

    Args:
        data: its values.
        chosen_TK: [T, K] int64 experts of each token, in any order: those that the layer under test chose. The last
            digits of its logits decide between nearly equal ones, which is no error.
    """
    x_TD = data.x_BSD[0].to(torch.float64).requires_grad_()
    logits_TE = x_TD @ data.router_ED.to(torch.float64).T
    weights_TK = logits_TE.gather(1, chosen_TK).softmax(dim=1)
    y_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_DF2, down_FD) in enumerate(zip(data.gate_up_EDF2, data.down_EFD, strict=True)):
        tokens_N, places_N = (chosen_TK == expert).nonzero(as_tuple=True)
        gate_NF, up_NF = (x_TD[tokens_N] @ gate_up_DF2.to(torch.float64)).chunk(2, dim=1)
        rows_ND = (F.silu(gate_NF) * up_NF) @ down_FD.to(torch.float64)
        y_TD = y_TD.index_add(0, tokens_N, weights_TK[tokens_N, places_N].unsqueeze(1) * rows_ND)
    torch.autograd.backward(y_TD, data.gradient_BSD[0].to(torch.float64))
    assert x_TD.grad is not None, "a leaf that requires a gradient"
    return Truth(y_TD.detach(), x_TD.grad)


def best_experts(data: LayerData, top_k: int) -> Tensor:
    """Return the experts [T, K] that fp64 logits choose."""
    return (data.x_BSD[0].to(torch.float64) @ data.router_ED.to(torch.float64).T).topk(top_k, dim=1).indices


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the L2 norm of the difference over that of the exact tensor."""
    return float((found.to(torch.float64) - exact).norm() / exact.norm())


def agreement(chosen_TK: Tensor, best_TK: Tensor) -> float:
    """Return the share of choices that both made."""
    return float((chosen_TK.unsqueeze(2) == best_TK.unsqueeze(1)).sum() / best_TK.numel())


def fullest_over_mean(chosen_TK: Tensor, num_experts: int) -> float:
    """Return the load of the fullest expert relative to the mean."""
    return float(torch.bincount(chosen_TK.flatten(), minlength=num_experts).max() * num_experts / chosen_TK.numel())
