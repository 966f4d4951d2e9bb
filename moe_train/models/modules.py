"""Feed-forward networks."""

from __future__ import annotations

from torch import Tensor, nn

from moe_train.config.model import Activation
from moe_train.moe.modules import Linear
from moe_train.ops.activation import activate, inner_width


class FeedForward(nn.Module):
    """down(activation(gate_up(x))): of two projections, or of three with a gate.

    Args:
        dim: width D of a token.
        hidden_dim: hidden width F.
        activation: which; a gated one makes the first projection twice as wide, gate before up.
        init_std: standard deviation of the initial values of the first projection.
        out_std: the same of the second.
        biased: whether both projections have a bias.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Activation,
        init_std: float,
        out_std: float,
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(dim, inner_width(activation, hidden_dim), init_std, biased)
        self.down = Linear(hidden_dim, dim, out_std, biased)

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
