"""The exchange of a model: one choice for all its layers with experts."""

from __future__ import annotations

from moe_train.config.attention import SwitchHeadConfig
from moe_train.config.model import ModelConfig
from moe_train.config.schema import LayoutConfig
from moe_train.dist.mesh import Mesh
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import Exchange, exchange_for


def model_exchange(mesh: Mesh, config: ModelConfig, layout: LayoutConfig = LayoutConfig()) -> Exchange:  # noqa: B008 (frozen)
    """Return the exchange of the feed-forward layers, or of attention where it alone has experts.

    A layer with another number of experts derives its own (`Exchange.for_experts`). Collective: every rank calls this
    at the same point.

    Args:
        mesh: the layout.
        config: the model.
        layout: which exchange, in how many parts, with how much patience.
    """
    ffn, attention = config.ffn, config.attention
    if ffn.num_experts == 0 and isinstance(attention, SwitchHeadConfig):
        experts, choices = config.heads * attention.experts, config.heads * attention.top_k
        return exchange_for(mesh, experts, False, layout, choices)
    return exchange_for(mesh, ffn.num_experts, is_padded(ffn.capacity), layout, ffn.top_k)
