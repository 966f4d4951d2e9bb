"""Choices that are made with knowledge of later tokens: in training, and in an evaluation that asks for it.

Where an expert, or a block, takes the best tokens of a whole sequence, later tokens decide about earlier ones. A causal
model that is trained so must choose otherwise where it is used. Every module that has both ways looks ahead in training
and, in evaluation, only inside of `looking_ahead`: what a held-out loss says by itself is what generation will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Foresighted(nn.Module):
    """A module that chooses with knowledge of later tokens in training, and can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.looks_ahead = False
        """Whether it does so in evaluation, too."""

    @property
    def knows_later_tokens(self) -> bool:
        """Whether the next choice may be made with them."""
        return self.training or self.looks_ahead


def foresighted(model: nn.Module) -> list[Foresighted]:
    """Return the modules of a model that have both ways."""
    return [module for module in model.modules() if isinstance(module, Foresighted)]


@contextmanager
def looking_ahead(model: nn.Module) -> Iterator[None]:
    """Let a model in evaluation choose as it does in training."""
    modules = foresighted(model)
    for module in modules:
        module.looks_ahead = True
    try:
        yield
    finally:
        for module in modules:
            module.looks_ahead = False
