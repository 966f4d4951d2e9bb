"""Linear maps and norms. Weights may be fp32 masters: each is cast to its input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.model import NormKind
from moe_train.moe.roles import Kind, Role
from moe_train.ops.norm import rms_norm


class Linear(nn.Module):
    """x @ weight.T + bias; the weight [out, in] is cast to the dtype of x.

    Args:
        in_dim: width of the input.
        out_dim: width of the output.
        std: standard deviation of the initial weight; a bias starts at zero.
        biased: whether there is a bias.
    """

    bias: nn.Parameter | None

    def __init__(self, in_dim: int, out_dim: int, std: float, biased: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_dim)) if biased else None)
        self.roles = {"weight": Role(Kind.DENSE, std), "bias": Role(Kind.DENSE, std=0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) · gain, computed in at least fp32 (arXiv 1910.07467, eq. 4).

    Args:
        dim: width D of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.roles = {"weight": Role(Kind.DENSE, std=None)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]; the result has the dtype of x."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / deviation · gain + bias, computed in at least fp32 (arXiv 1607.06450, eq. 4).

    Args:
        dim: width D of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.roles = {"weight": Role(Kind.DENSE, std=None), "bias": Role(Kind.DENSE, std=0.0)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]; the result has the dtype of x."""
        precise = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(precise), self.bias.to(precise)
        return F.layer_norm(x.to(precise), self.weight.shape, weight, bias, self.eps).to(x.dtype)


def build_norm(kind: NormKind, dim: int, eps: float) -> RMSNorm | LayerNorm:
    """Return a norm over the last dimension of width ``dim``."""
    return RMSNorm(dim, eps) if kind == "rms" else LayerNorm(dim, eps)
