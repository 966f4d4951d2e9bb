"""What a model remembers of a text while it continues it: keys and values of the tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Keys and values of the tokens that one attention has seen, in order. Nothing in it has a gradient."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, ...] = ()

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self._kept[0].shape[2] if self._kept else 0

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add tokens; return all there are now.

        Args:
            new: keys, values, or what else an attention keeps: each [B, heads, S, width].

        Returns:
            As many tensors [B, heads, length, width].
        """
        if self._kept:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(self._kept, new, strict=True))
        self._kept = new
        return new


class TextMemory:
    """The memories of all blocks of a model.

    Args:
        num_blocks: of the model.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Memory() for _ in range(num_blocks)]
        self.length = 0
        """Tokens that the model has seen; a block may have seen fewer of them."""
