"""The keys of the model: blocks, feed-forward layers and experts, where its first weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moe_train.config.attention import AttentionConfig, GroupedQueryConfig
from moe_train.config.balance import BalanceConfig
from moe_train.config.base import Strict
from moe_train.config.classifier import HeadConfig
from moe_train.config.depth import DepthConfig, FullDepthConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.routing import CapacityConfig, DroplessConfig, RouterConfig, TopKRouterConfig

Activation: TypeAlias = Literal["swiglu", "geglu", "gelu", "relu", "swiglu_clamped"]
"""What stands between the two projections of a feed-forward network; those in -glu have a gate."""
Compute: TypeAlias = Literal["auto", "reference", "loop", "bmm", "grouped_mm"]
"""How the products of a rank's experts are made (`moe_train.ops.expert_ffn`)."""
NormKind: TypeAlias = Literal["rms", "layer"]
"""RMSNorm (arXiv 1910.07467), or LayerNorm with gain and bias (arXiv 1607.06450)."""


class FFNConfig(Strict):
    """Feed-forward part of the blocks: dense networks, or experts."""

    hidden_dim: PositiveInt = 512
    """Hidden width of the dense layers."""
    activation: Activation = "swiglu"
    """Activation of the dense layers and of the shared experts."""
    num_experts: NonNegativeInt = 0
    """Experts per MoE layer; 0: a dense model."""
    top_k: PositiveInt = 2
    """Experts per token."""
    expert_dim: PositiveInt = 256
    """Hidden width of one expert."""
    expert_activation: Activation | None = None
    """Activation of the experts; null: that of the dense layers."""
    expert_bias: bool = False
    """Whether both projections of an expert have a bias (gpt-oss)."""
    num_noop_experts: NonNegativeInt = 0
    """Further experts that do nothing: a token may choose to pass the experts by, wholly or in part (integrated
    Mixture-of-Depths-and-Experts, arXiv 2404.02258, section 4.5)."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token visits, summed (one network of that multiple of their width)."""
    shared_dim: PositiveInt | None = None
    """Hidden width of one shared expert; null: expert_dim."""
    shared_gate: bool = False
    """Whether the shared experts are multiplied by a learned sigmoid of the token (Qwen2-MoE)."""
    every: PositiveInt = 1
    """Every n-th layer is MoE (the last of each n), the others are dense."""
    first_dense: NonNegativeInt = 0
    """The first layers are dense (DeepSeek)."""
    router: RouterConfig = TopKRouterConfig()
    """How tokens choose experts."""
    balance: BalanceConfig = BalanceConfig()
    """How load is kept even."""
    capacity: CapacityConfig = DroplessConfig()
    """How many assignments an expert takes."""
    compute: Compute = "auto"
    """How experts' products are made. loop: one after the other; bmm: all at once, padded to the fullest; grouped_mm:
    torch's own product for groups; reference: plain autograd; auto: by device and load. Equal but for rounding."""
    graph: GraphConfig | None = None
    """Every token visits every expert and a graph couples them: no router, no balance, no capacity; null: tokens choose
    experts."""


class MTPConfig(Strict):
    """Multi-token prediction: in training, further blocks predict the tokens after the next (DeepSeek-V3, 2.2)."""

    depth: NonNegativeInt = 0
    """Blocks, each predicting one token further ahead; 0: none. They share embedding and output head with the model."""
    coef: NonNegativeFloat = 0.3
    """Weight of their mean loss relative to the cross-entropy; their balance losses have it, too."""
    late_coef: NonNegativeFloat = 0.1
    """The same in the late part of the training."""
    late_after: Annotated[float, Field(ge=0.0, le=1.0)] = 0.676
    """Share of the steps after which late_coef holds (DeepSeek-V3: 10 of 14.8 trillion tokens)."""


class UpcycleConfig(Strict):
    """How the experts are made when model.init_from is a dense checkpoint (arXiv 2212.05055)."""

    noise: NonNegativeFloat = 0.0
    """Standard deviation of what is added to every copy but the first, relative to that of the weights: 0 keeps the
    first forward pass equal to the dense model's."""


class ModelConfig(Strict):
    """One transformer."""

    dim: PositiveInt = 256
    """Width of the residual stream."""
    layers: NonNegativeInt = 4
    """Blocks; none only where a classifier's head has experts."""
    heads: PositiveInt = 8
    """Query heads."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding, at least the tokens of the tokenizer; null: as many."""
    tie_embeddings: bool = True
    """The output head is the embedding matrix."""
    head_bias: bool = False
    """Whether the output head has a bias; needs a head of its own."""
    norm: NormKind = "rms"
    """Kind of all norms but those of queries, keys and latent vectors."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square (RMSNorm) or to the variance (LayerNorm)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How positions enter: queries and keys are rotated, or a learned vector is added to each token's."""
    max_positions: PositiveInt | None = None
    """Learned positions: the longest text, in tokens; null with rotary ones."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections into the residual stream get 1/sqrt(2·layers) of it."""
    init_from: str | None = None
    """Folder with the first weights: a Hugging Face model, or what moe_train.export wrote; null: random ones."""
    adopt: bool = False
    """Whether the architecture is that of init_from's config.json; keys on the command line still win."""
    upcycle: UpcycleConfig = UpcycleConfig()
    """How a dense model becomes experts."""
    attention: AttentionConfig = GroupedQueryConfig()
    """Attention."""
    ffn: FFNConfig = FFNConfig()
    """Feed-forward layers and experts."""
    classifier: Annotated[HeadConfig | None, Field(discriminator="kind")] = None
    """Tells the class of a text; null: a language model."""
    depth: DepthConfig = FullDepthConfig()
    """Which tokens pass which blocks."""
    mtp: MTPConfig = MTPConfig()
    """Multi-token prediction."""


HOW_NOT_WHAT: dict[str, Any] = {"ffn": {"compute"}, "attention": {"compute"}}
"""Keys that say how a model is computed, not what it computes: no part of a run's identity, nor of an export."""
