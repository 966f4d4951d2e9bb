"""What stands between the two products of an expert, forward and backward, row by row."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.config.model import Activation
from moe_train.ops.activation import CLAMP, GAIN, GATED, activated
from moe_train.ops.pointwise import pointwise

aten = torch.ops.aten


@pointwise
def weighted_hidden(inner_NF: Tensor, weights_N1: Tensor, kind: Activation) -> Tensor:
    """Return activation(inner) · weight, [N, F]: the weight of an expert commutes with its second product.

    Args:
        inner_NF: [N, 2F] for activations with a gate, else [N, F]: result of the first product.
        weights_N1: [N, 1] in the same dtype.
        kind: of the activation.
    """
    return activated.function(inner_NF, kind).mul_(weights_N1)


@pointwise
def hidden_gradients(
    inner_NF: Tensor, weights_N1: Tensor, grad_NF: Tensor, kind: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the backward pass needs of `weighted_hidden`, in one pass.

    Args:
        inner_NF: as there.
        weights_N1: as there.
        grad_NF: [N, F] gradient of the result.
        kind: of the activation.

    Returns:
        The result again [N, F]; the gradients of ``inner_NF``, and of the weights [N] in at least fp32.
    """
    hidden_NF, inner_grad_NF = activation_gradients(inner_NF, grad_NF * weights_N1, kind)
    precise = torch.promote_types(inner_NF.dtype, torch.float32)
    weight_grad_N = (hidden_NF * grad_NF).sum(dim=1, dtype=precise)
    return hidden_NF.mul_(weights_N1), inner_grad_NF, weight_grad_N


def activation_gradients(inner_NF: Tensor, grad_NF: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """Return activation(inner) [N, F] and the gradient of ``inner`` for that of the former."""
    if kind in GATED:
        gate_NF, up_NF = inner_NF.chunk(2, dim=1)
        return gated_gradients(gate_NF, up_NF, grad_NF, kind)
    match kind:
        case "relu":
            return inner_NF.relu(), aten.threshold_backward(grad_NF, inner_NF, 0)
        case "gelu":
            return F.gelu(inner_NF), aten.gelu_backward(grad_NF, inner_NF)
        case _:
            raise AssertionError(f"{kind} has a gate")


def gated_gradients(gate_NF: Tensor, up_NF: Tensor, grad_NF: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """Return the activation [N, F] and the gradient [N, 2F] of gate and up."""
    match kind:
        case "swiglu":
            opened_NF = F.silu(gate_NF)
            gate_grad_NF = aten.silu_backward(grad_NF * up_NF, gate_NF)
        case "geglu":
            opened_NF = F.gelu(gate_NF)
            gate_grad_NF = aten.gelu_backward(grad_NF * up_NF, gate_NF)
        case "swiglu_clamped":
            low_NF, up_1_NF = gate_NF.clamp(max=CLAMP), up_NF.clamp(-CLAMP, CLAMP) + 1.0
            share_NF = torch.sigmoid(GAIN * low_NF)
            opened_NF = low_NF * share_NF
            slope_NF = share_NF * (1.0 + GAIN * low_NF * (1.0 - share_NF))
            gate_grad_NF = (grad_NF * up_1_NF * slope_NF).masked_fill(gate_NF > CLAMP, 0)
            up_grad_NF = (grad_NF * opened_NF).masked_fill(up_NF.abs() > CLAMP, 0)
            return up_1_NF * opened_NF, torch.cat([gate_grad_NF, up_grad_NF], dim=1)
        case "gelu" | "relu":
            raise AssertionError(f"{kind} has no gate")
        case _:
            assert_never(kind)
    return opened_NF * up_NF, torch.cat([gate_grad_NF, grad_NF * opened_NF], dim=1)
