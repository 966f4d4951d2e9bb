"""The feed-forward layer of DeepSeekMoE."""

from __future__ import annotations

from moe_train.config.balance import AuxLossConfig
from moe_train.config.routing import TopKRouterConfig
from moe_train.layers.arguments import at_most, check, divides, not_negative, positive
from moe_train.layers.base import Layer, layer_config


class DeepSeekMoE(Layer):
    """Fine-grained experts, and shared ones that every token visits (DeepSeekMoE, arXiv 2401.06066, eq. 9 to 11).

    Each routed expert is cut into num_segments m: there are m·N of width expert_dim / m, of which a token visits m·K.
    Their parameters and FLOPs stay as they were (the router's grow m times), with far more combinations. Weights are
    the probabilities as they are; the shared experts' outputs are summed and added. The load is evened out within each
    sequence (DeepSeek-V2, arXiv 2405.04434, eq. 23).

    >>> import torch
    >>> from moe_train import DeepSeekMoE
    >>> with torch.device("meta"):  # four billion weights: shapes only
    ...     moe = DeepSeekMoE(
    ...         dim=5120,
    ...         num_shared_experts=2,
    ...         num_routed_experts=160,
    ...         top_k_experts=6,
    ...         expert_dim=1536,
    ...         shared_expert_dim=5120,
    ...         num_segments=4,
    ...         router_aux_loss_coef=0.001
    ...     )
    >>> sum(parameter.numel() for parameter in moe.parameters())
    3935436800
    >>> moe = DeepSeekMoE(dim=16, num_routed_experts=8, top_k_experts=2, expert_dim=32)
    >>> hidden_states = torch.randn(2, 10, 16)
    >>> output, aux_loss = moe(hidden_states)
    >>> output.shape, aux_loss.shape
    (torch.Size([2, 10, 16]), torch.Size([]))

    Args:
        dim: width D of a token.
        num_shared_experts: experts that every token visits.
        num_routed_experts: experts N before they are cut.
        top_k_experts: how many of these K a token would visit.
        expert_dim: hidden width of one before it is cut; None: 4 · dim.
        shared_expert_dim: hidden width of one shared expert; None: expert_dim.
        num_segments: parts m of each routed expert; divides expert_dim.
        router_aux_loss_coef: weight of aux_loss, already applied.

    Raises:
        ConfigError: with every argument that is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        num_shared_experts: int = 2,
        num_routed_experts: int = 64,
        top_k_experts: int = 6,
        expert_dim: int | None = None,
        shared_expert_dim: int | None = None,
        num_segments: int = 4,
        router_aux_loss_coef: float = 0.001,
    ) -> None:
        hidden_dim = 4 * dim if expert_dim is None else expert_dim
        shared_dim = hidden_dim if shared_expert_dim is None else shared_expert_dim
        check(
            positive(dim=dim, num_routed_experts=num_routed_experts, top_k_experts=top_k_experts),
            positive(expert_dim=hidden_dim, shared_expert_dim=shared_dim, num_segments=num_segments),
            not_negative(num_shared_experts=num_shared_experts, router_aux_loss_coef=router_aux_loss_coef),
            at_most("num_routed_experts", num_routed_experts, top_k_experts=top_k_experts),
            divides("expert_dim", hidden_dim, num_segments=num_segments),
        )
        ffn = layer_config(
            TopKRouterConfig(normalize="none"),
            num_segments * num_routed_experts,
            num_segments * top_k_experts,
            hidden_dim // num_segments,
            AuxLossConfig(coef=router_aux_loss_coef, scope="sequence"),
        )
        super().__init__(dim, ffn, num_shared_experts * shared_dim)
