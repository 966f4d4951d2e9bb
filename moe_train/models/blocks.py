"""The parts of a transformer block. Weights may be fp32 masters: every module casts its own to its input's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config.schema import ModelConfig
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.context import RoutingContext
from moe_train.moe.layer import MoELayer
from moe_train.moe.roles import Kind, Role
from moe_train.ops.attention import causal_attention, rotate


class Linear(nn.Module):
    """x @ weight.T without bias; the weight [out, in] is cast to the dtype of x.

    Args:
        in_dim: width of the input.
        out_dim: width of the output.
        std: standard deviation of the initial weight.
    """

    def __init__(self, in_dim: int, out_dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.roles = {"weight": Role(Kind.DENSE, std)}

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., out_dim]."""
        return F.linear(x, self.weight.to(x.dtype))


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


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202, eq. 6).

    Args:
        dim: width D of a token.
        hidden_dim: hidden width.
        init_std: standard deviation of the initial values of gate and up.
        out_std: the same of down.
    """

    def __init__(self, dim: int, hidden_dim: int, init_std: float, out_std: float) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, init_std)
        self.down = Linear(hidden_dim, dim, out_std)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply to [..., D]."""
        gate, up = self.gate_up(x_BSD).chunk(2, dim=-1)
        out_BSD: Tensor = self.down(F.silu(gate) * up)
        return out_BSD


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions.

    Args:
        config: the model.
        out_std: standard deviation of the initial values of the output projection.
    """

    def __init__(self, config: ModelConfig, out_std: float) -> None:
        super().__init__()
        self.width = config.dim // config.heads
        self.heads = config.heads
        self.kv_heads = config.attention.kv_heads or config.heads
        self.qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.width, config.init_std)
        self.out = Linear(self.heads * self.width, config.dim, out_std)

    def forward(self, x_BSD: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
        """Apply to [B, S, D], with the rotary tables [S, W/2] of these positions."""
        batch, length, _ = x_BSD.shape
        heads_BHSW = self.qkv(x_BSD).view(batch, length, -1, self.width).transpose(1, 2)
        q_BHSW, k_BGSW, v_BGSW = torch.split(heads_BHSW, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        q_BHSW, k_BGSW = rotate(q_BHSW, cos_SW, sin_SW), rotate(k_BGSW, cos_SW, sin_SW)
        y_BHSW = causal_attention(q_BHSW, k_BGSW, v_BGSW)
        out_BSD: Tensor = self.out(y_BHSW.transpose(1, 2).flatten(2))
        return out_BSD


@dataclass(frozen=True)
class BlockOutput:
    """What a block returns.

    Attributes:
        x_BSD: [B, S, D] residual stream.
        record: the router's sums of a MoE block; None for a dense one.
    """

    x_BSD: Tensor
    record: RoutingRecord | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        config: the model.
        ffn: a dense SwiGLU or a MoE layer.
        out_std: standard deviation of the initial values of the attention's output projection.
    """

    def __init__(self, config: ModelConfig, ffn: SwiGLU | MoELayer, out_std: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, out_std)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = ffn

    def forward(self, x_BSD: Tensor, cos_SW: Tensor, sin_SW: Tensor, context: RoutingContext) -> BlockOutput:
        """Apply to the residual stream [B, S, D] of the tokens that ``context`` describes."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SW, sin_SW)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoELayer):
            output = self.ffn(normed_BSD, context)
            return BlockOutput(x_BSD + output.y_BSD, output.record)
        return BlockOutput(x_BSD + self.ffn(normed_BSD), None)
