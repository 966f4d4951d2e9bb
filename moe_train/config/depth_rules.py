"""Rules of Mixture-of-Depths: which blocks can be passed by."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.model import ModelConfig
from moe_train.errors import Problem


def depth_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between ``model.depth`` and the blocks."""
    depth = model.depth
    if not isinstance(depth, MixtureOfDepthsConfig):
        return
    if depth.every > model.layers:
        rule = f"leaves no block that only some tokens pass among model.layers={model.layers}"
        yield Problem("model.depth.every", depth.every, rule, "lower it, or set model.depth.kind=full")
    if depth.causal == "classifier" and depth.predictor_dim != type(depth).model_fields["predictor_dim"].default:
        rule = "is the width of the predictor, and model.depth.causal is classifier"
        yield Problem("model.depth.predictor_dim", depth.predictor_dim, rule, "leave it out")
    yield from window_problems(model, depth)
    graph = model.ffn.graph
    if model.ffn.num_experts and graph is not None and graph.expert == "block":
        rule = "blocks as experts see whole sequences of all ranks at the same positions, and here each has its own"
        yield Problem("model.depth.kind", depth.kind, rule, "set model.ffn.graph.expert=ffn, or model.depth.kind=full")


def window_problems(model: ModelConfig, depth: MixtureOfDepthsConfig) -> Iterator[Problem]:
    """Yield that a block with a window takes only some tokens: these are next to each other, whatever lies between."""
    attention = model.attention
    if not isinstance(attention, GroupedQueryConfig) or attention.window is None:
        return
    passed_by = range(depth.every, model.layers + 1, depth.every)
    if any(attention.full_every is None or layer % attention.full_every for layer in passed_by):
        rule = "counts positions, and a block that takes only some tokens has others between them"
        remedy = f"set model.attention.full_every={depth.every}, or leave the window out, or set model.depth.kind=full"
        yield Problem("model.attention.window", attention.window, rule, remedy)
