"""Rules of dense graph-coupled layers: what routes tokens has no meaning there, and which edges there can be."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig
from moe_train.errors import Problem

GRAPH = "model.ffn.graph"
OF_ROUTING = ("router", "balance", "capacity", "num_shared_experts")
"""Fields of a layer that say how tokens choose experts, or who works beside those."""


def graph_problems(ffn: FFNConfig, graph: GraphConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of a dense graph-coupled layer."""
    yield from routed_problems(ffn)
    yield from edge_problems(ffn.num_experts, graph)


def routed_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield the settings that a layer in which every token visits every expert would ignore."""
    rule = f"every token visits every expert: {GRAPH} is set"
    for key in OF_ROUTING:
        if getattr(ffn, key) != type(ffn).model_fields[key].default:
            yield Problem(f"model.ffn.{key}", "set", rule, f"leave it out, or set {GRAPH}=null")
    if ffn.top_k not in (type(ffn).model_fields["top_k"].default, ffn.num_experts):
        yield Problem("model.ffn.top_k", ffn.top_k, rule, f"leave it out, or set {GRAPH}=null")


def edge_problems(num_experts: int, graph: GraphConfig) -> Iterator[Problem]:
    """Yield what is wrong with the sources of an expert."""
    if graph.max_neighbors is None or graph.max_neighbors == 0:
        return
    possible = num_experts if graph.self_edges else num_experts - 1
    key, value = f"{GRAPH}.max_neighbors", graph.max_neighbors
    if value > possible:
        others = "" if graph.self_edges else " others"
        yield Problem(key, value, f"an expert has {possible}{others} to listen to", "lower it, or leave it out for all")
    elif value < possible and graph.adjacency == "none":
        rule = "without learned logits no edge is stronger than another"
        yield Problem(key, value, rule, f"choose {GRAPH}.adjacency=sigmoid or softmax, or leave it out")
