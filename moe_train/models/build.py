"""From the configuration of a model to its blocks: which layer is what, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import nn

from moe_train.config.attention import SwitchHeadConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.models.attention import Attention, build_attention
from moe_train.models.block_experts import BlockExperts
from moe_train.models.blocks import Block, CoupledBlocks, TransformerBlock
from moe_train.models.depth import DepthBlock, depth_of
from moe_train.models.modules import FeedForward, SharedExperts
from moe_train.models.switchhead import SwitchHead
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.exchange import Exchange
from moe_train.moe.experts import DenseExperts, ExpertNetworks, Experts
from moe_train.moe.graph.coupling import Coupling
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.layer import MoELayer
from moe_train.moe.routers import build_router

ExpertsKind = TypeVar("ExpertsKind", bound=ExpertNetworks)


def has_last_norm(config: ModelConfig) -> bool:
    """Whether tokens' vectors pass a norm after the last block.

    Without blocks they are the embedding's own: their sizes are learnt and say how much a word counts. A classifier
    may keep its sizes behind blocks, too.
    """
    keeps_sizes = config.classifier is not None and not config.classifier.token_norm
    return config.layers > 0 and not keeps_sizes


def is_moe_layer(config: FFNConfig, layer: int) -> bool:
    """Whether layer number ``layer`` (from 0) is MoE: after the first dense ones, the last of each ``every``."""
    return config.num_experts > 0 and layer >= config.first_dense and (layer + 1) % config.every == 0


def build_block(config: ModelConfig, layer: int, exchange: Exchange) -> TransformerBlock:
    """Build one block by the layer pattern; around it, where only some tokens pass it, what chooses them."""
    block, depth = build_whole_block(config, layer, exchange), depth_of(config, layer)
    return block if depth is None else DepthBlock(block, config.dim, depth, config.init_std)


def build_whole_block(config: ModelConfig, layer: int, exchange: Exchange) -> Block | CoupledBlocks:
    """Build one block as it is where all tokens pass it."""
    # GPT-2: what writes into the residual stream starts smaller, by the root of the number of writers.
    out_std = config.init_std / (2 * config.layers) ** 0.5
    ffn = config.ffn
    network: FeedForward | MoELayer | GraphLayer
    if not is_moe_layer(ffn, layer):
        network = FeedForward(config.dim, ffn.hidden_dim, ffn.activation, config.init_std, out_std)
    elif ffn.graph is None:
        network = build_moe(config, exchange, out_std)
    else:
        network = build_graph(config, ffn.graph, layer, exchange, out_std)
        if ffn.graph.expert == "block":
            return CoupledBlocks(network)
    return Block(config, build_attending(config, layer, exchange, out_std), network)


def build_attending(config: ModelConfig, layer: int, exchange: Exchange, out_std: float) -> Attention | SwitchHead:
    """Build the attention of a layer, with the experts that the exchange keeps here if it has some."""
    if isinstance(config.attention, SwitchHeadConfig):
        return SwitchHead(config, config.attention, out_std, exchange)
    return build_attention(config, layer, out_std)


def build_graph(config: ModelConfig, graph: GraphConfig, layer: int, exchange: Exchange, out_std: float) -> GraphLayer:
    """Build a dense graph-coupled layer around the experts held here."""
    experts: nn.Module
    if graph.expert == "ffn":
        experts = build_experts(DenseExperts, config, exchange.experts, out_std)
    else:
        experts = build_blocks(config, layer, exchange, out_std)
    return GraphLayer(graph, exchange.dense, experts, Coupling(config, out_std))


def build_blocks(config: ModelConfig, layer: int, exchange: Exchange, out_std: float) -> BlockExperts:
    """Build those experts held here that are whole blocks."""
    ffn = config.ffn
    activation = ffn.expert_activation or ffn.activation
    network = FeedForward(config.dim, ffn.expert_dim, activation, config.init_std, out_std, ffn.expert_bias)
    return BlockExperts(Block(config, build_attention(config, layer, out_std), network), exchange.experts)


def build_moe(config: ModelConfig, exchange: Exchange, out_std: float) -> MoELayer:
    """Build the MoE layer that the configuration describes, with the experts that the exchange keeps here."""
    ffn = config.ffn
    return MoELayer(
        router=build_router(ffn, config.dim, config.init_std),
        capacity=Capacity(ffn.capacity, ffn.num_experts, ffn.top_k, ffn.num_noop_experts),
        exchange=exchange,
        experts=build_experts(partial(Experts, compute=ffn.compute), config, exchange.experts, out_std),
        balance=Balance(ffn),
        shared=build_shared(config, out_std),
    )


def build_experts(kind: Callable[..., ExpertsKind], config: ModelConfig, experts: range, out_std: float) -> ExpertsKind:
    """Build the experts held here, be they chosen by tokens or not."""
    ffn = config.ffn
    activation = ffn.expert_activation or ffn.activation
    return kind(config.dim, ffn.expert_dim, experts, config.init_std, out_std, activation, ffn.expert_bias)


def build_shared(config: ModelConfig, out_std: float) -> SharedExperts | None:
    """Build the network that every token visits in a MoE layer, if there is one."""
    ffn = config.ffn
    width = shared_width(ffn)
    if width == 0:
        return None
    return SharedExperts(config.dim, width, ffn.activation, config.init_std, out_std, ffn.shared_gate)


def shared_width(ffn: FFNConfig) -> int:
    """Return the joint hidden width of the shared experts; 0: there are none."""
    return ffn.num_shared_experts * (ffn.shared_dim or ffn.expert_dim)
