"""What the layers share: assembly from the trainer's parts, initial values, the load-balance loss of one process."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_train.config.balance import AuxLossConfig, BalanceConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import CapacityConfig, DroplessConfig, RouterConfig
from moe_train.models.initialise import initialise
from moe_train.models.modules import FeedForward
from moe_train.moe.balance import Balance
from moe_train.moe.capacity import Capacity
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer as RoutedExperts
from moe_train.moe.routers import build_router

INIT_STD = ModelConfig().init_std
"""Standard deviation of initial weights, where a router has no rule of its own."""
UNWEIGHTED, NO_LIMIT = AuxLossConfig(coef=1.0), DroplessConfig()
"""What most layers have: a load-balance loss that the caller weights, and no capacity."""


class Layer(nn.Module):
    """What the layers with experts share.

    Args:
        dim: width D of a token.
        ffn: experts, router, load-balance loss and capacity.
        shared_dim: hidden width of the network that every token visits; 0: none.
    """

    def __init__(self, dim: int, ffn: FFNConfig, shared_dim: int = 0) -> None:
        super().__init__()
        exchange = LocalExchange(ffn.num_experts)
        self.moe = RoutedExperts(
            router=build_router(ffn, dim, INIT_STD),
            capacity=Capacity(ffn.capacity, ffn.num_experts, ffn.top_k),
            exchange=exchange,
            experts=Experts(dim, ffn.expert_dim, exchange.experts, INIT_STD, INIT_STD),
            balance=Balance(ffn),
            shared=FeedForward(dim, shared_dim, "swiglu", INIT_STD, INIT_STD) if shared_dim else None,
        )
        fill(self)

    def forward(self, hidden_states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states_BSD: [B, S, D] tokens of any floating dtype.

        Returns:
            The output [B, S, D] and the scalar load-balance loss, in at least fp32.
        """
        output = self.moe(hidden_states_BSD, context_of(hidden_states_BSD, self.training))
        return output.y_BSD, aux_loss(self, self.moe.balance, output.record.statistics, hidden_states_BSD)


def layer_config(
    router: RouterConfig,
    num_experts: int,
    top_k: int,
    expert_dim: int,
    aux: AuxLossConfig = UNWEIGHTED,
    capacity: CapacityConfig = NO_LIMIT,
) -> FFNConfig:
    """Return the trainer's configuration of a layer; without z-loss, which has no place in one returned loss."""
    return FFNConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=expert_dim,
        router=router,
        balance=BalanceConfig(aux=aux),
        capacity=capacity,
    )


def fill(layer: nn.Module) -> None:
    """Give every parameter its initial value, seeded by torch's global generator; none on the meta device."""
    if any(parameter.is_meta for parameter in layer.parameters()):
        return
    with torch.device("cpu"):  # values are drawn there, whatever device the caller builds on
        initialise(layer, seed_of_draws())


def seed_of_draws() -> int:
    """Draw a seed from torch's global generator, so that torch.manual_seed governs a layer too."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def context_of(hidden_states_BSD: Tensor, training: bool) -> RoutingContext:
    """Return the context of a batch without ids or neighbours, with new random draws for each pass in training.

    Activation checkpointing restores the global generator, so that recomputation draws the same.
    """
    batch, length, _ = hidden_states_BSD.shape
    places_BS = torch.arange(batch * length, device=hidden_states_BSD.device).view(batch, length)
    context = RoutingContext.of(places_BS)
    return replace(context, seed=seed_of_draws()) if training else context


def aux_loss(layer: nn.Module, balance: Balance, statistics: tuple[Tensor, ...], hidden_states_BSD: Tensor) -> Tensor:
    """Return the weighted load-balance loss of a batch that is whole in this process; zero in evaluation.

    Args:
        layer: in training or evaluation.
        balance: its losses, with the weight.
        statistics: what they measured.
        hidden_states_BSD: [B, S, D] tokens; the loss is in their dtype, but at least fp32.
    """
    precise = torch.promote_types(hidden_states_BSD.dtype, torch.float32)
    config = balance.ffn.balance.aux
    if not layer.training or config is None or config.coef == 0.0:
        return torch.zeros((), dtype=precise, device=hidden_states_BSD.device)
    num_tokens = hidden_states_BSD[..., 0].numel()
    return (config.coef * balance.values(statistics)["aux_loss"] / max(num_tokens, 1)).to(precise)
