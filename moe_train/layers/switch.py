"""The feed-forward layer of the Switch Transformer."""

from __future__ import annotations

from moe_train.config.balance import AuxLossConfig
from moe_train.config.routing import FactorCapacityConfig, SwitchRouterConfig
from moe_train.layers.arguments import check, not_negative, positive
from moe_train.layers.base import Layer, layer_config


class SwitchFFN(Layer):
    """Top-1 experts with a limit on what each takes (Switch Transformer, arXiv 2101.03961, section 2.1 and 2.2).

    The weight is the probability of the chosen expert, so that the router learns from the task. An expert takes at most
    ceil(capacity_factor · S / E) tokens of a sequence in training; later ones get zeros: the residual outside carries
    them. Router input jitter and initial weights are those of section 2.4; experts are SwiGLU networks.

    >>> import torch
    >>> from moe_train import SwitchFFN
    >>> output, aux_loss = SwitchFFN(dim=16, num_experts=4)(torch.randn(2, 10, 16))
    >>> output.shape, aux_loss.shape
    (torch.Size([2, 10, 16]), torch.Size([]))

    Args:
        dim: width D of a token.
        num_experts: experts E.
        expert_dim: hidden width of one expert; None: 4 · dim.
        capacity_factor: room of an expert in training relative to an even load.
        load_balance_loss_coef: weight of aux_loss, already applied.

    Raises:
        ConfigError: with every argument that is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        expert_dim: int | None = None,
        capacity_factor: float = 1.25,
        *,
        load_balance_loss_coef: float = 0.01,
    ) -> None:
        hidden_dim = 4 * dim if expert_dim is None else expert_dim
        check(
            positive(dim=dim, num_experts=num_experts, expert_dim=hidden_dim, capacity_factor=capacity_factor),
            not_negative(load_balance_loss_coef=load_balance_loss_coef),
        )
        aux, capacity = AuxLossConfig(coef=load_balance_loss_coef), FactorCapacityConfig(factor=capacity_factor)
        super().__init__(dim, layer_config(SwitchRouterConfig(), num_experts, 1, hidden_dim, aux, capacity))
