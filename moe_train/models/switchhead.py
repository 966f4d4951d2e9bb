"""Few heads whose values and outputs are made by experts: SwitchHead (Csordás et al. 2023, arXiv 2312.07987)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from moe_train.config.attention import SwitchHeadConfig
from moe_train.config.balance import BalanceConfig, EntropyConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import SigmoidRouterConfig
from moe_train.models.attention import cut, head_width
from moe_train.models.memory import Memory
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import Exchange
from moe_train.moe.head_experts import HeadExperts
from moe_train.moe.layer import MoELayer
from moe_train.moe.modules import Linear
from moe_train.moe.record import LayerRecord
from moe_train.moe.routers.heads import HeadRouter
from moe_train.moe.routers.linear import learned_role
from moe_train.ops.attention import causal_attention
from moe_train.ops.rotary import Rotary, rotate

PARTS = {"values": 101, "outputs": 102}
"""Both layers with experts, and what their random draws are of, so that those of a block are not the same three times
(beyond `moe.context.Purpose`)."""


@dataclass(frozen=True)
class Attended:
    """What attention with experts returns.

    Attributes:
        y_BSD: [B, S, D] what it adds to the residual stream.
        records: sums of its layers, in order of `PARTS`.
    """

    y_BSD: Tensor
    records: tuple[LayerRecord, ...]


class SwitchHead(nn.Module):
    """Causal attention of H heads with E experts each for values, and as many for outputs (eq. 7 to 10).

    Queries and keys are dense. A token's value in a head is the weighted sum of some of the head's experts, which the
    token itself chooses where it stands (the source); what a head has seen is led back by experts that the token
    chooses that looked (the destination). Both are layers with experts like the feed-forward ones: the same routers,
    records, exchanges and shards.

    Args:
        config: the model.
        attention: its attention.
        out_std: standard deviation of the initial values of the output experts.
        exchange: brings tokens to experts.
    """

    def __init__(self, config: ModelConfig, attention: SwitchHeadConfig, out_std: float, exchange: Exchange) -> None:
        super().__init__()
        self.heads, self.width = config.heads, head_width(config, attention)
        self.compute = attention.compute
        self.qk = Linear(config.dim, 2 * self.heads * self.width, config.init_std)
        exchange = exchange.for_experts(self.heads * attention.experts)
        self.values = build_side("out", config, attention, config.init_std, exchange)
        self.outputs = build_side("in", config, attention, out_std, exchange)

    @property
    def expert_layers(self) -> dict[str, MoELayer]:
        """Both layers by name, in order of their records."""
        return {"values": self.values, "outputs": self.outputs}

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None, context: RoutingContext, memory: Memory | None = None
    ) -> Attended:
        """Apply to [B, S, D].

        Args:
            x_BSD: normed residual stream.
            rotary: table of these positions; None turns nothing.
            context: of these tokens. Padding has no values, and gets no output.
            memory: keys and values of earlier tokens, to which these are added; None: there are none.
        """
        values = self.values(x_BSD, context.at_layer(PARTS["values"]))
        seen_BSN = self.look(x_BSD, values.y_BSD, rotary, memory)
        outputs = self.outputs(seen_BSN, context.at_layer(PARTS["outputs"]), x_BSD)
        return Attended(outputs.y_BSD, (values.record, outputs.record))

    def look(self, x_BSD: Tensor, v_BSN: Tensor, rotary: Rotary | None, memory: Memory | None = None) -> Tensor:
        """Return what each head sees of the values [B, S, H · W], in the same shape, which is that of the batch."""
        q_BSN, k_BSN = self.qk(x_BSD).chunk(2, dim=-1)
        q_BHSW, k_BHSW, v_BHSW = (cut(t, self.width).transpose(1, 2) for t in (q_BSN, k_BSN, v_BSN))
        q_BHSW, k_BHSW = rotate(q_BHSW, rotary), rotate(k_BHSW, rotary)
        if memory is not None:
            k_BHSW, v_BHSW = memory.extend(k_BHSW, v_BHSW)
        y_BHSW = causal_attention(q_BHSW, k_BHSW, v_BHSW, compute=self.compute)
        return y_BHSW.transpose(1, 2).flatten(2)


def build_side(
    side: Literal["in", "out"], config: ModelConfig, attention: SwitchHeadConfig, std: float, exchange: Exchange
) -> MoELayer:
    """Build the layer that makes values ("out" of tokens) or outputs ("in" to them).

    Args:
        side: which.
        config: the model.
        attention: its attention.
        std: standard deviation of the experts' initial values.
        exchange: of a layer with so many experts.
    """
    layer, heads, width = as_layer(config, attention), config.heads, head_width(config, attention)
    assert isinstance(layer.router, SigmoidRouterConfig), "heads have one kind of router"
    role = learned_role(config.init_std)
    return MoELayer(
        router=HeadRouter(config.dim, heads, attention.experts, attention.top_k, layer.router, role),
        capacity=Capacity(layer.capacity, layer.num_experts, layer.top_k),
        exchange=exchange,
        experts=HeadExperts(config.dim, width, heads, side, exchange.experts, layer.num_experts, std),
        balance=Balance(layer, heads),
        shared=None,
    )


def as_layer(config: ModelConfig, attention: SwitchHeadConfig) -> FFNConfig:
    """Return what capacity and losses must know of one side, in the words of a layer with experts."""
    entropy = EntropyConfig(coef=attention.entropy) if attention.entropy else None
    return FFNConfig(
        num_experts=config.heads * attention.experts,
        top_k=config.heads * attention.top_k,
        router=SigmoidRouterConfig(normalize="none", scale=attention.scale, expert_dropout=attention.expert_dropout),
        balance=BalanceConfig(entropy=entropy),
    )
