"""Kinds of attention: grouped queries, and latent keys and values."""

from __future__ import annotations

from typing import Protocol, assert_never

import torch
from torch import Tensor, nn

from moe_train.config.attention import GroupedQueryConfig, LatentConfig, SwitchHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.models.memory import Memory
from moe_train.moe.modules import Linear, RMSNorm
from moe_train.moe.roles import Kind, Role
from moe_train.ops.attention import causal_attention, whole_attention
from moe_train.ops.rotary import Rotary, rotate, score_magnitude

LATENT_EPS = 1e-6
"""Added to the mean square of compressed queries, keys and values: fixed in DeepSeek's published code."""


class Attention(Protocol):
    """What a block asks of its attention."""

    def __call__(
        self, x_BSD: Tensor, rotary: Rotary | None, memory: Memory | None = None, valid_BS: Tensor | None = None
    ) -> Tensor:
        """Apply to [B, S, D]; the table is of S positions and of width `rotary_width`, None turns nothing.

        What the memory keeps of earlier tokens is seen, too; these tokens are added to it. Where a token sees its whole
        text, the places [B, S] that are not valid are seen by none; causal attention meets no padding, which is last.
        """


def build_attention(config: ModelConfig, layer: int, out_std: float) -> GroupedQueryAttention | LatentAttention:
    """Return the attention of a layer, without values; that which has experts is built in `models.switchhead`.

    Args:
        config: the model.
        layer: depth of its block, from 0.
        out_std: standard deviation of the initial values of the output projection.
    """
    match config.attention:
        case GroupedQueryConfig() as attention:
            return GroupedQueryAttention(config, attention, window_of(attention, layer), out_std)
        case LatentConfig() as attention:
            return LatentAttention(config, attention, out_std)
        case SwitchHeadConfig():
            raise AssertionError("its experts need an exchange: `models.switchhead` builds it")
        case _:
            assert_never(config.attention)


def window_of(attention: GroupedQueryConfig, layer: int) -> int | None:
    """Return how many positions a token sees in a layer; None: all earlier ones."""
    sees_all = attention.full_every is not None and (layer + 1) % attention.full_every == 0
    return None if sees_all else attention.window


def head_width(config: ModelConfig, attention: GroupedQueryConfig | SwitchHeadConfig) -> int:
    """Return the width W of a head."""
    return attention.head_dim or config.dim // config.heads


def rotary_width(config: ModelConfig) -> int:
    """Return the width of the part of a head that is rotated."""
    attention = config.attention
    return attention.rope_dim if isinstance(attention, LatentConfig) else head_width(config, attention)


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (GQA, arXiv 2305.13245), causal or of the whole text.

    Args:
        config: the model.
        attention: its attention.
        window: positions that a token sees; None: all earlier ones, or all.
        out_std: standard deviation of the initial values of the output projection.
    """

    sinks_H: nn.Parameter | None

    def __init__(self, config: ModelConfig, attention: GroupedQueryConfig, window: int | None, out_std: float) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = attention.kv_heads or config.heads
        self.width = head_width(config, attention)
        self.window = window
        self.causal = attention.causal
        self.compute = attention.compute
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv = Linear(config.dim, rows, config.init_std, attention.qkv_bias)
        self.out = Linear(self.heads * self.width, config.dim, out_std, attention.out_bias)
        self.q_norm, self.k_norm = (query_key_norm(config, attention, heads) for heads in (self.heads, self.kv_heads))
        self.roles = {"sinks_H": Role(Kind.DENSE, config.init_std)}
        self.register_parameter("sinks_H", nn.Parameter(torch.empty(self.heads)) if attention.sinks else None)

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, memory: Memory | None = None, valid_BS: Tensor | None = None
    ) -> Tensor:
        """Apply to [B, S, D], with the rotary table of these positions."""
        widths = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        q_BSN, k_BSN, v_BSN = torch.split(self.qkv(x_BSD), widths, dim=-1)
        q_BHSW = rotate(self.to_heads(normed(q_BSN, self.q_norm)), rotary)
        k_BGSW, v_BGSW = rotate(self.to_heads(normed(k_BSN, self.k_norm)), rotary), self.to_heads(v_BSN)
        if memory is not None:
            k_BGSW, v_BGSW = memory.extend(k_BGSW, v_BGSW, window=self.window)
        if self.causal:
            y_BHSW = causal_attention(
                q_BHSW, k_BGSW, v_BGSW, window=self.window, sinks_H=self.sinks_H, compute=self.compute
            )
        else:
            assert memory is None, "a token that sees later ones cannot be computed before them"
            y_BHSW = whole_attention(q_BHSW, k_BGSW, v_BGSW, valid_BS, compute=self.compute)
        out_BSD: Tensor = self.out(y_BHSW.transpose(1, 2).flatten(2))
        return out_BSD

    def to_heads(self, x_BSN: Tensor) -> Tensor:
        """Cut [B, S, heads · W] into [B, heads, S, W]."""
        return cut(x_BSN, self.width).transpose(1, 2)


def query_key_norm(config: ModelConfig, attention: GroupedQueryConfig, heads: int) -> RMSNorm | None:
    """Return the norm of queries or keys: of one head's width (Qwen3), of all heads together (OLMoE), or none."""
    width = head_width(config, attention)
    match attention.qk_norm:
        case "none":
            return None
        case "head":
            return RMSNorm(width, config.norm_eps)
        case "full":
            return RMSNorm(heads * width, config.norm_eps)


def normed(x_BSN: Tensor, norm: RMSNorm | None) -> Tensor:
    """Normalise runs of the norm's width in [B, S, N]."""
    if norm is None:
        return x_BSN
    normed_BSN: Tensor = norm(cut(x_BSN, norm.weight.shape[0])).flatten(2)
    return normed_BSN


def cut(x_BSN: Tensor, width: int) -> Tensor:
    """Cut [B, S, n · width] into [B, S, n, width]."""
    return x_BSN.view(*x_BSN.shape[:2], -1, width)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9 to 19, and eq. 37 to 47 in appendix C).

    Keys and values of all heads are made of a compressed vector of kv_rank; only it and one rotated key of rope_dim,
    shared by the heads, are remembered. Positions enter by way of that key and a part of each query.

    Args:
        config: the model.
        attention: its attention.
        out_std: standard deviation of the initial values of the output projection.
    """

    def __init__(self, config: ModelConfig, attention: LatentConfig, out_std: float) -> None:
        super().__init__()
        self.heads = config.heads
        self.sizes = attention
        q_width = attention.nope_dim + attention.rope_dim
        self.scale = q_width**-0.5 * score_magnitude(attention.yarn)
        q_rows, std = self.heads * q_width, config.init_std
        if attention.q_rank is None:
            self.q = Linear(config.dim, q_rows, std)
        else:
            self.q_down = Linear(config.dim, attention.q_rank, std)
            self.q_norm = RMSNorm(attention.q_rank, LATENT_EPS)
            self.q_up = Linear(attention.q_rank, q_rows, std)
        self.kv_down = Linear(config.dim, attention.kv_rank + attention.rope_dim, std)
        self.kv_norm = RMSNorm(attention.kv_rank, LATENT_EPS)
        self.kv_up = Linear(attention.kv_rank, self.heads * (attention.nope_dim + attention.v_dim), std)
        self.out = Linear(self.heads * attention.v_dim, config.dim, out_std)

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, memory: Memory | None = None, valid_BS: Tensor | None = None
    ) -> Tensor:
        """Apply to [B, S, D], with the rotary table of these positions."""
        q_BHSW = self.queries(x_BSD, rotary)
        latent_BSN, key_BSW = self.compressed(x_BSD, rotary)
        if memory is not None:
            (kept_BGJN,) = memory.extend(torch.cat([latent_BSN, key_BSW], dim=-1).unsqueeze(1))
        if memory is not None and kept_BGJN.shape[2] > x_BSD.shape[1]:
            y_BHSU = self.attend_compressed(q_BHSW, kept_BGJN)
        else:  # the beginning of a text: making keys and values once costs less than meeting each vector with each head
            k_BHSW, v_BHSU = self.decompressed(latent_BSN, key_BSW)
            y_BHSU = causal_attention(q_BHSW, k_BHSW, v_BHSU, scale=self.scale, compute=self.sizes.compute)
        out_BSD: Tensor = self.out(y_BHSU.transpose(1, 2).flatten(2))
        return out_BSD

    def attend_compressed(self, q_BHSW: Tensor, kept_BGJN: Tensor) -> Tensor:
        """Attend to compressed vectors: queries and results pass the up-projection, not keys and values (V2, 2.1.2).

        q · (U c) = (Uᵀ q) · c, and a sum of U c is U times the sum of c: all heads share one key and one value, which
        is a part of the key.

        Args:
            q_BHSW: [B, H, S, nope + rope] queries of the last positions.
            kept_BGJN: [B, 1, J, kv_rank + rope] what is kept of all positions: compressed vectors, rotated keys.

        Returns:
            [B, H, S, v].
        """
        sizes, up_NR = self.sizes, self.kv_up.weight.to(q_BHSW.dtype)
        up_HNR = up_NR.view(self.heads, sizes.nope_dim + sizes.v_dim, sizes.kv_rank)
        to_keys_HWR, to_values_HUR = torch.split(up_HNR, [sizes.nope_dim, sizes.v_dim], dim=1)
        plain_BHSW, turned_BHSW = torch.split(q_BHSW, [sizes.nope_dim, sizes.rope_dim], dim=-1)
        q_BHSN = torch.cat([plain_BHSW @ to_keys_HWR, turned_BHSW], dim=-1)
        latent_BGJR = kept_BGJN[..., : sizes.kv_rank]
        y_BHSR = causal_attention(q_BHSN, kept_BGJN, latent_BGJR, scale=self.scale, compute=sizes.compute)
        return y_BHSR @ to_values_HUR.transpose(1, 2)

    def queries(self, x_BSD: Tensor, rotary: Rotary | None) -> Tensor:
        """Return the queries [B, H, S, nope + rope]."""
        q_BSN = self.q(x_BSD) if self.sizes.q_rank is None else self.q_up(self.q_norm(self.q_down(x_BSD)))
        q_BHSW = cut(q_BSN, self.sizes.nope_dim + self.sizes.rope_dim).transpose(1, 2)
        plain, turned = torch.split(q_BHSW, [self.sizes.nope_dim, self.sizes.rope_dim], dim=-1)
        return torch.cat([plain, rotate(turned, rotary)], dim=-1)

    def keys_and_values(self, x_BSD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Return the keys [B, H, S, nope + rope] and the values [B, H, S, v]."""
        return self.decompressed(*self.compressed(x_BSD, rotary))

    def compressed(self, x_BSD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Return the compressed vectors [B, S, kv_rank], normed, and the shared keys [B, S, rope], rotated."""
        latent_BSN, key_BSW = torch.split(self.kv_down(x_BSD), [self.sizes.kv_rank, self.sizes.rope_dim], dim=-1)
        # The norm is of the latent part only: the shared key keeps the size that its weights give it.
        return self.kv_norm(latent_BSN), rotate(key_BSW.unsqueeze(1), rotary).squeeze(1)

    def decompressed(self, latent_BSN: Tensor, key_BSW: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, as above, from what `compressed` returns."""
        kv_BHSN = cut(self.kv_up(latent_BSN), self.sizes.nope_dim + self.sizes.v_dim).transpose(1, 2)
        k_nope_BHSW, v_BHSU = torch.split(kv_BHSN, [self.sizes.nope_dim, self.sizes.v_dim], dim=-1)
        k_rope_BHSW = key_BSW.unsqueeze(1).expand(-1, self.heads, -1, -1)
        return torch.cat([k_nope_BHSW, k_rope_BHSW], dim=-1), v_BHSU
