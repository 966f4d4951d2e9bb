"""torch.compile for those parts of a block whose shapes are those of the batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_train.models.blocks import Block
from moe_train.models.switchhead import SwitchHead
from moe_train.models.transformer import Transformer
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.layer import MoELayer


def apply_compile(model: Transformer, backend: str = "inductor") -> None:
    """Compile norm and attention, dense networks and shared experts of each block, each part by itself.

    Routers, exchange and experts are left as they are: how many rows come to an expert is another number in each step,
    and each would be a shape to compile for. What is compiled meets one shape in training, and at most one more for
    each other batch size or length, after which torch compiles for any.

    Call it before `apply_remat`, which then computes the compiled parts again as a whole, and before the model's
    modules are sharded. Values differ from those of the uncompiled model by rounding.

    Args:
        model: changed in place.
        backend: what torch.compile compiles with; other than the default in tests.
    """
    for owner, method in static_parts(model):
        setattr(owner, method, torch.compile(getattr(owner, method), backend=backend))


def static_parts(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """Yield modules and the names of their methods with shapes that no routing decides."""
    for block in (outer.inner for outer in model.all_blocks):
        if not isinstance(block, Block):
            continue  # experts that are blocks: their weights are stacked, and each is called by itself
        if isinstance(block.attention, SwitchHead):
            yield block.attention, "look"
        else:
            yield block, "attend"
        if not isinstance(block.ffn, MoELayer | GraphLayer):
            yield block, "feed"
        elif isinstance(block.ffn, MoELayer) and block.ffn.shared is not None:
            yield block.ffn.shared, "forward"
