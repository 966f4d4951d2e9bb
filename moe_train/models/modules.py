"""Linear maps, norms and feed-forward networks. Weights may be fp32 masters: each is cast to its input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.model import Activation
from moe_train.moe.roles import Kind, Role
from moe_train.ops.activation import activate, inner_width


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
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.weight.shape, self.weight.to(precise), self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """down(activation(gate_up(x))): of two projections, or of three with a gate.

    Args:
        dim: width D of a token.
        hidden_dim: hidden width F.
        activation: which; a gated one makes the first projection twice as wide, gate before up.
        init_std: standard deviation of the initial values of the first projection.
        out_std: the same of the second.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, init_std: float, out_std: float) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(dim, inner_width(activation, hidden_dim), init_std)
        self.down = Linear(hidden_dim, dim, out_std)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply to [..., D]."""
        out_BSD: Tensor = self.down(activate(self.gate_up(x_BSD), self.activation))
        return out_BSD


class SharedExperts(FeedForward):
    """Experts that every token visits, as one network of their joint width, with or without a gate of its own.

    With the gate the output is multiplied by sigmoid(w · x), one number per token (Qwen1.5-MoE).

    Args:
        dim: width D of a token.
        hidden_dim: joint hidden width.
        activation: which.
        init_std: standard deviation of the initial values of the first projection and of the gate.
        out_std: the same of the second projection.
        gated: whether there is a gate.
    """

    def __init__(
        self, dim: int, hidden_dim: int, activation: Activation, init_std: float, out_std: float, gated: bool = False
    ) -> None:
        super().__init__(dim, hidden_dim, activation, init_std, out_std)
        self.token_gate = Linear(dim, 1, init_std) if gated else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply to [..., D]."""
        out_BSD = super().forward(x_BSD)
        return out_BSD if self.token_gate is None else self.token_gate(x_BSD).sigmoid() * out_BSD
