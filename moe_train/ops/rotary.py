"""Rotary positions, plain and stretched to longer texts (YaRN, Llama 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.attention import Llama3Config, RotaryConfig, YarnConfig
from moe_train.ops.pointwise import pointwise


@dataclass(frozen=True)
class Rotary:
    """The rotation of each position, times the magnitude that YaRN gives it.

    Attributes:
        cos_SW: [S, W/2] cosines; [B, 1, S, W/2] where the sequences of a batch have positions of their own.
        sin_SW: sines, as these.
    """

    cos_SW: Tensor
    sin_SW: Tensor

    def at(self, indices_BC: Tensor) -> Rotary:
        """Return the rotations of some positions of each sequence: those with these indices, [B, C] int64."""
        if self.cos_SW.dim() == 2:
            return Rotary(*(table_SW[indices_BC].unsqueeze(1) for table_SW in (self.cos_SW, self.sin_SW)))
        index = indices_BC[:, None, :, None].expand(-1, 1, -1, self.cos_SW.shape[-1])
        return Rotary(*(table_BSW.gather(2, index) for table_BSW in (self.cos_SW, self.sin_SW)))

    def since(self, first: int) -> Rotary:
        """Return the rotations of the positions from ``first`` on."""
        return Rotary(self.cos_SW[first:], self.sin_SW[first:])


def rotary_table(
    length: int, width: int, config: RotaryConfig, dtype: torch.dtype, device: torch.device, first: int = 0
) -> Rotary:
    """Return the rotations of ``length`` positions, computed in fp64.

    Args:
        length: positions S.
        width: W, of the part of a head that is rotated.
        config: base and stretching.
        dtype: of the table; at least fp32, so that late positions keep their phase.
        device: of the table.
        first: the first of these positions.
    """
    positions_S = torch.arange(first, first + length, dtype=torch.float64, device=device)
    angles_SW = torch.outer(positions_S, frequencies(width, config, device))
    size = 1.0 if config.yarn is None else rotary_magnitude(config.yarn)
    return Rotary((size * angles_SW.cos()).to(dtype), (size * angles_SW.sin()).to(dtype))


def frequencies(width: int, config: RotaryConfig, device: torch.device) -> Tensor:
    """Return the angle per position of each pair, [W/2] fp64: theta^(-2i/W) (RoFormer, arXiv 2104.09864, eq. 15).

    Stretched positions (`stretched`) divide slow frequencies by a factor; fast ones stay.
    """
    pairs_W = torch.arange(width // 2, dtype=torch.float64, device=device)
    plain_W = config.rope_theta ** (-2.0 * pairs_W / width)
    if config.yarn is not None:
        share_W = yarn_share(pairs_W, width, config.rope_theta, config.yarn)
        return stretched(plain_W, share_W, config.yarn.factor)
    if config.llama3 is not None:
        return stretched(plain_W, llama3_share(plain_W, config.llama3), config.llama3.factor)
    return plain_W


def stretched(plain_W: Tensor, share_W: Tensor, factor: float) -> Tensor:
    """Return the frequencies [W/2] of which a share [W/2] between 0 and 1 is divided by the factor."""
    return plain_W * (1.0 - share_W) + plain_W / factor * share_W


def llama3_share(plain_W: Tensor, llama3: Llama3Config) -> Tensor:
    """Return how far each pair is stretched, [W/2], by its turns over the original length (Llama 3.1's code)."""
    turns_W = plain_W * llama3.original_length / (2.0 * math.pi)
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    return ((high - turns_W) / (high - low)).clamp(0.0, 1.0)


def yarn_share(pairs_W: Tensor, width: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Return how far each pair is stretched, [W/2] (YaRN, arXiv 2309.00071, eq. 13 to 17)."""
    low, high = (pair_that_turns(turns, width, theta, yarn) for turns in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return ((pairs_W - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)


def pair_that_turns(turns: float, width: int, theta: float, yarn: YarnConfig) -> float:
    """Return the (fractional) index of the pair that turns so many times over the original length (YaRN, eq. 17)."""
    return width * math.log(yarn.original_length / (2.0 * math.pi * turns)) / (2.0 * math.log(theta))


def magnitude(factor: float, a: float) -> float:
    """Return 0.1 · a · ln(factor) + 1 (YaRN, eq. 22, with DeepSeek's a)."""
    return 0.1 * a * math.log(factor) + 1.0


def rotary_magnitude(yarn: YarnConfig) -> float:
    """Return what rotated queries and keys are multiplied with."""
    return magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)


def score_magnitude(yarn: YarnConfig | None) -> float:
    """Return what the scores of latent attention are multiplied with (DeepSeek-V2's published code)."""
    return 1.0 if yarn is None else magnitude(yarn.factor, yarn.mscale_all_dim) ** 2


def rotate(x_BHSW: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate the pairs (i, i + W/2) of each head by its position's angles (the half-split layout of Llama).

    Args:
        x_BHSW: [B, H, S, W] queries or keys; any dtype, computed in that of the table.
        rotary: of S positions and width W; None: positions enter elsewhere, nothing turns.
    """
    if rotary is None:
        return x_BHSW
    return turned(x_BHSW, rotary.cos_SW, rotary.sin_SW)


@pointwise
def turned(x_BHSW: Tensor, cos_SW: Tensor, sin_SW: Tensor) -> Tensor:
    """Return each head's pairs times cosine and sine of its position."""
    first, second = x_BHSW.to(cos_SW.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos_SW - second * sin_SW, second * cos_SW + first * sin_SW], dim=-1).to(x_BHSW.dtype)
