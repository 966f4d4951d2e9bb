"""Top-k experts in the place of a dense feed-forward network."""

from __future__ import annotations

from moe_train.config.routing import TopKRouterConfig
from moe_train.layers.arguments import at_most, check, fraction, positive
from moe_train.layers.base import Layer, layer_config


class MoELayer(Layer):
    """Top-k experts in the place of a dense feed-forward network (GShard, Mixtral).

    softmax over all experts, then the K largest. Their weights sum to one, but for top_k=1, where the probability
    itself is the weight: else the router would get no gradient from the task. Nothing is dropped. aux_loss is 1.0 when
    the load is even and not weighted yet.

    >>> import torch
    >>> from moe_train import MoELayer
    >>> with torch.device("meta"):  # 403 million weights: shapes only
    ...     moe_ffn = MoELayer(
    ...         dim=2048,
    ...         num_experts=8,
    ...         top_k=2,
    ...         expert_hidden_dim=8192
    ...     )
    >>> sum(parameter.numel() for parameter in moe_ffn.parameters())
    402669568
    >>> moe_ffn = MoELayer(dim=16, num_experts=8, top_k=2, expert_hidden_dim=64)
    >>> hidden_states, task_loss = torch.randn(2, 10, 16), torch.tensor(2.0)
    >>> output, aux_loss = moe_ffn(hidden_states)
    >>> total_loss = task_loss + 0.01 * aux_loss
    >>> output.shape, total_loss.shape
    (torch.Size([2, 10, 16]), torch.Size([]))

    Args:
        dim: width D of a token.
        num_experts: experts E.
        top_k: experts K per token.
        expert_hidden_dim: hidden width of one expert's SwiGLU; None: 4 · dim.
        shared_expert: whether there are experts that every token visits, whose sum is added.
        num_shared_experts: how many, each as wide as the others.
        router_jitter: in training the router's input is multiplied by U[1 - jitter, 1 + jitter].

    Raises:
        ConfigError: with every argument that is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        expert_hidden_dim: int | None = None,
        *,
        shared_expert: bool = False,
        num_shared_experts: int = 1,
        router_jitter: float = 0.0,
    ) -> None:
        hidden_dim = 4 * dim if expert_hidden_dim is None else expert_hidden_dim
        check(
            positive(dim=dim, num_experts=num_experts, top_k=top_k, expert_hidden_dim=hidden_dim),
            at_most("num_experts", num_experts, top_k=top_k),
            positive(num_shared_experts=num_shared_experts),
            fraction(router_jitter=router_jitter),
        )
        router = TopKRouterConfig(normalize="selected" if top_k > 1 else "none", jitter=router_jitter)
        ffn = layer_config(router, num_experts, top_k, hidden_dim)
        super().__init__(dim, ffn, num_shared_experts * hidden_dim if shared_expert else 0)
