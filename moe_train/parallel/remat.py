"""Activations that the backward pass computes again instead of keeping them (Chen et al. 2016, arXiv 1604.06174).

What was decided in the forward pass is decided for good (`moe_train.ops.keep`): neither way to recompute routes again,
and neither calls the collectives again by which routers and capacities agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_train.models.blocks import Block, CoupledBlocks, TransformerBlock
from moe_train.models.switchhead import SwitchHead
from moe_train.models.transformer import Transformer
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.layer import MoELayer
from moe_train.ops.keep import Tape, is_kept

Remat = Literal["none", "selective", "full"]
FUSED_ATTENTION = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""Their work grows with the square of the length, and leaves one vector per token: cheap to keep, dear to repeat."""


def apply_remat(model: Transformer, mode: Remat) -> None:
    """Let the backward pass compute parts of each block again. Values, gradients and records stay what they are.

    Call it after `apply_compile` and before the model's modules are sharded: what is computed again lies inside of
    the modules' forward, so that their parameters are there when the backward pass needs them.

    Args:
        model: changed in place.
        mode: none: nothing. full: a block keeps its input and its decisions; its tokens travel again. selective:
            whatever lies between two collectives is computed again by itself, so that no token travels twice: norm and
            attention (the fused product is kept), routers, experts, shared experts, dense networks, the coupling of a
            graph. Kept are the residual stream, what the exchange brought, and what came home where it is needed.
    """
    for block in model.all_blocks if mode != "none" else []:
        regions = [Region(block)] if mode == "full" else regions_of(block)
        for region in regions:
            compute = getattr(region.owner, region.method)
            setattr(region.owner, region.method, Recomputed(compute, region.saved))


@dataclass(frozen=True)
class Region:
    """What is computed again by itself.

    Attributes:
        owner: a module.
        method: name of the method.
        saved: operators whose results are kept.
    """

    owner: nn.Module
    method: str = "forward"
    saved: tuple[Any, ...] = ()


def regions_of(block: TransformerBlock) -> Iterator[Region]:
    """Yield the parts of a block that exchange nothing with other ranks, but for what is decided once."""
    block = block.inner
    assert isinstance(block, Block | CoupledBlocks), "these two have parts"
    layer = block.layer if isinstance(block, CoupledBlocks) else block.ffn
    if isinstance(block, Block):
        yield from regions_of_attention(block)
    if isinstance(layer, MoELayer):
        yield from regions_of_experts(layer)
    elif isinstance(layer, GraphLayer):
        # With a recomputation of its own, chunk by chunk, it already keeps less than its results.
        yield from () if layer.config.recompute else (Region(layer.experts), Region(layer.coupling))
    else:
        yield Region(block, "feed")


def regions_of_attention(block: Block) -> Iterator[Region]:
    """Yield norm and attention as one; where attention has experts, what lies between its exchanges."""
    attention = block.attention
    if not isinstance(attention, SwitchHead):
        yield Region(block, "attend", FUSED_ATTENTION)
        return
    yield from regions_of_experts(attention.values)
    yield Region(attention, "look", FUSED_ATTENTION)
    yield from regions_of_experts(attention.outputs)


def regions_of_experts(layer: MoELayer) -> Iterator[Region]:
    """Yield what a layer with experts computes here."""
    modules = (layer.router, layer.experts, layer.shared)
    return (Region(module) for module in modules if isinstance(module, nn.Module))


@dataclass(frozen=True)
class Recomputed:
    """A method that keeps its arguments and its decisions for the backward pass, but not what lies between.

    An object, not a closure: a copy of the module has a copy of this, which computes with the copied weights.

    Attributes:
        compute: the method; it changes nothing and draws nothing from torch's random state.
        saved: operators whose results are kept, too.
    """

    compute: Callable[..., Any]
    saved: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Compute. Without gradients, or in a part of what is computed again anyway, that is all."""
        if is_kept() or not torch.is_grad_enabled():
            return self.compute(*args)
        surroundings = partial(contexts, self.saved)
        return checkpoint(self.compute, *args, use_reentrant=False, preserve_rng_state=False, context_fn=surroundings)


def contexts(saved: tuple[Any, ...]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what surrounds the first pass through a part, and each later one."""
    tape = Tape()
    if not saved:
        return tape.recording(), tape.replaying()
    keeping, handing_out = create_selective_checkpoint_contexts(list(saved))  # type: ignore[no-untyped-call]
    return _Both(keeping, tape.recording()), _Both(handing_out, tape.replaying())


class _Both(AbstractContextManager[None]):
    """Two contexts as one, which may be entered again."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self.contexts = (outer, inner)
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        return self.stack.__exit__(kind, error, at)
