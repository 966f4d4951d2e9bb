"""The keys of routing: how tokens choose experts, how much an expert takes.

Each router and each capacity rule is a section of its own, chosen by ``kind``.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

from moe_train.config.base import Fraction, Strict


class LearnedRouterConfig(Strict):
    """What all routers with weights have in common."""

    scale: PositiveFloat = 1.0
    """Multiplies the weights (routed scaling factor, DeepSeek-V2). With K, K chosen experts add up like one dense layer
    of their joint width; with 1 they are averaged."""
    jitter: Fraction = 0.0
    """In training the router's input, not the experts', is multiplied by U[1 - jitter, 1 + jitter] (Switch, 2.4)."""
    expert_dropout: Fraction = 0.0
    """Chance that an expert is not offered to a token in training; it affects the choice, not the weights. Where fewer
    than K are offered, the others follow by index, even those outside a token's groups."""


class TopKRouterConfig(LearnedRouterConfig):
    """softmax, then the K largest (OLMoE, DeepSeekMoE, Qwen; with normalised weights Mixtral and Qwen3)."""

    kind: Literal["topk"] = "topk"
    """Kind of router."""
    normalize: Literal["none", "selected"] = "selected"
    """selected: the K weights of a token sum to one (with top_k=1 the router then gets no gradient: refused)."""


class TopKSoftmaxRouterConfig(LearnedRouterConfig):
    """The K largest, then a softmax over these (Mixtral, gpt-oss)."""

    kind: Literal["topk_softmax"] = "topk_softmax"
    """Kind of router."""
    bias: bool = False
    """Whether a learned bias is added to the logits; it changes choice and weights (gpt-oss)."""
    gate_dim: PositiveInt | None = None
    """Hidden width of a router of two linear maps with ReLU between, both with a bias; null: one linear map. (Source:
    NoorMajdoub/Mixture-of-experts_MoE.)"""


class SigmoidRouterConfig(LearnedRouterConfig):
    """sigmoid per expert, then the K largest: experts do not compete for a token's weight (sigma-MoE, DeepSeek-V3)."""

    kind: Literal["sigmoid"] = "sigmoid"
    """Kind of router."""
    normalize: Literal["none", "selected"] = "selected"
    """selected: the K weights of a token sum to one (with top_k=1 the router then gets no gradient: refused)."""


class NoisyTopKRouterConfig(LearnedRouterConfig):
    """The K largest after adding learned noise, then a softmax over these (Shazeer et al. 2017, eq. 3 to 5)."""

    kind: Literal["noisy_topk"] = "noisy_topk"
    """Kind of router."""


class SwitchRouterConfig(LearnedRouterConfig):
    """softmax, then the largest, its probability as weight (Switch Transformer); needs top_k=1."""

    kind: Literal["switch"] = "switch"
    """Kind of router."""
    jitter: Fraction = 0.01
    """In training the router's input, not the experts', is multiplied by U[1 - jitter, 1 + jitter] (Switch, 2.4)."""
    init_scale: PositiveFloat = 0.1
    """Initial weights: truncated normal with standard deviation sqrt(init_scale / model.dim) (Switch, 2.4)."""


class GShardRouterConfig(LearnedRouterConfig):
    """Top-2 with normalised weights; the load-balance loss counts first choices (GShard); needs top_k=2."""

    kind: Literal["gshard"] = "gshard"
    """Kind of router."""
    second: Literal["greedy", "sampled"] = "greedy"
    """Second expert: the next best, or in training drawn with its probability among the others."""
    dispatch_threshold: PositiveFloat | None = None
    """In training the second choice is made with probability min(1, weight / threshold), GShard: 0.5; null: always."""


class GroupLimitedRouterConfig(LearnedRouterConfig):
    """Top-K among the experts of the best groups: DeepSeek-V3 by default, V2 with softmax, max and no normalisation."""

    kind: Literal["group_limited"] = "group_limited"
    """Kind of router."""
    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """How logits become scores."""
    groups: PositiveInt = 4
    """Groups of consecutive experts, mapped to nodes or ranks; divides num_experts."""
    top_groups: PositiveInt = 2
    """Groups in which a token may choose experts: bounds the ranks that it travels to."""
    group_score: Literal["max", "top2"] = "top2"
    """Score of a group: its best expert's (V2), or the sum of its two best (V3)."""
    normalize: Literal["none", "selected"] = "selected"
    """selected: the K weights of a token sum to one, before scale."""


class ExpertChoiceRouterConfig(LearnedRouterConfig):
    """Each expert takes its best S · top_k / E tokens of a sequence (Zhou et al. 2022).

    The load is even, but later tokens decide whether an earlier one is taken.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    """Kind of router."""
    allow_future_leak: bool = False
    """Must be true for a causal language model: in training later tokens take part in the choice. Evaluation and
    generation choose without them, and an evaluation reports both losses."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Of the running quantile per expert above which a token is taken where later ones are not known: how much of it
    stays at each optimizer step."""


class HashRouterConfig(Strict):
    """Experts by token id, from a fixed random table (Hash layers, Roller et al. 2021): nothing is learnt."""

    kind: Literal["hash"] = "hash"
    """Kind of router."""
    scale: PositiveFloat = 1.0
    """Multiplies the weights, which are 1 / top_k."""


class SinkhornRouterConfig(LearnedRouterConfig):
    """Top-K after Sinkhorn's balancing of all ranks' tokens in training, plain top-K in evaluation (S-BASE)."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    """Kind of router."""
    tolerance: PositiveFloat = 1e-4
    """The iteration stops when the mean change of the experts' multipliers falls below this."""
    max_iterations: PositiveInt = 100
    """It stops at the latest after so many rounds, each one collective."""


class BaseRouterConfig(LearnedRouterConfig):
    """The best assignment that gives every expert equally many of all ranks' tokens (BASE, Lewis et al. 2021).

    Greedy in evaluation; needs top_k=1.
    """

    kind: Literal["base"] = "base"
    """Kind of router."""


class HierarchicalRouterConfig(LearnedRouterConfig):
    """Groups first, then experts inside; the product of both weights (Shazeer et al. 2017, appendix B)."""

    kind: Literal["hierarchical"] = "hierarchical"
    """Kind of router."""
    groups: PositiveInt = 2
    """Groups of consecutive experts, mapped to nodes or ranks; divides num_experts."""
    top_groups: PositiveInt = 1
    """Groups that a token visits; divides top_k, and top_k / top_groups experts are taken in each."""


RouterConfig: TypeAlias = Annotated[
    TopKRouterConfig
    | TopKSoftmaxRouterConfig
    | SigmoidRouterConfig
    | NoisyTopKRouterConfig
    | SwitchRouterConfig
    | GShardRouterConfig
    | GroupLimitedRouterConfig
    | ExpertChoiceRouterConfig
    | HashRouterConfig
    | SinkhornRouterConfig
    | BaseRouterConfig
    | HierarchicalRouterConfig,
    Field(discriminator="kind"),
]


class DroplessConfig(Strict):
    """No capacity limit: every assignment is computed."""

    kind: Literal["dropless"] = "dropless"
    """Kind of capacity rule."""


class FactorCapacityConfig(Strict):
    """At most max(minimum, ceil(factor · n · K / E)) assignments per expert, n the valid tokens of the scope."""

    kind: Literal["factor"] = "factor"
    """Kind of capacity rule."""
    factor: PositiveFloat = 1.25
    """Capacity in training relative to a balanced load."""
    eval_factor: PositiveFloat | None = None
    """The same in evaluation; null: no limit, as at inference."""
    minimum: PositiveInt = 1
    """Least capacity, in assignments."""
    scope: Literal["sequence", "global", "rank"] = "sequence"
    """Tokens that compete: one sequence, all ranks' micro-batch, or one rank's (which depends on the layout)."""
    policy: Literal["position", "probability", "random"] = "position"
    """Who is kept: the earliest, the largest weights, or a draw by the token's place in the global batch."""
    order: Literal["token", "choice"] = "token"
    """choice: the first choices of all tokens before any second choice (GShard)."""
    reroute: bool = False
    """What finds no room goes to its token's next-best expert with room, with that expert's weight."""
    renormalize: Literal["before", "after"] = "before"
    """before: weights stay as before dropping; after: a token's kept weights are scaled up to the sum of all."""
    pad: bool = False
    """Experts get buffers of fixed size, filled up with zeros: no counts are exchanged and nothing waits for them."""


class DeviceCapacityConfig(Strict):
    """A budget per device, ceil(factor · n · K / D); the smallest weights are dropped (DeepSeek-V2, 2.2.4).

    No limit in evaluation.
    """

    kind: Literal["device"] = "device"
    """Kind of capacity rule."""
    factor: PositiveFloat = 1.0
    """Budget relative to a balanced load."""
    devices: PositiveInt = 4
    """Groups D of consecutive experts, a number of its own so that drops do not depend on parallel.ep."""
    exempt_fraction: Fraction = 0.1
    """Share of the sequences of which nothing is dropped; drawn by their place in the global batch."""
    scope: Literal["sequence", "global", "rank"] = "sequence"
    """Tokens that compete: one sequence, all ranks' micro-batch, or one rank's (which depends on the layout)."""


CapacityConfig: TypeAlias = Annotated[
    DroplessConfig | FactorCapacityConfig | DeviceCapacityConfig, Field(discriminator="kind")
]
