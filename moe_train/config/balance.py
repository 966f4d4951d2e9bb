"""The keys of balance: losses beside each other, of which any number is switched on, and the bias on the choice."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moe_train.config.base import Strict

Scope: TypeAlias = Literal["global", "sequence", "micro"]


class AuxLossConfig(Strict):
    """Load-balance loss E·Σ f·P (Switch eq. 4), 1.0 when balanced, per layer."""

    coef: NonNegativeFloat = 0.01
    """Weight relative to the cross-entropy per token."""
    scope: Scope = "global"
    """Tokens over which the load fraction f is counted: the whole optimizer step, each sequence alone, or one rank's
    micro-batch (which depends on the layout)."""


class ImportanceLoadConfig(Strict):
    """Squared coefficients of variation of the experts' summed weights and of their expected load.

    Shazeer et al. 2017, eq. 6 to 11, over the whole optimizer step.
    """

    importance_coef: NonNegativeFloat = 0.1
    """Weight of CV(importance)²."""
    load_coef: NonNegativeFloat = 0.1
    """Weight of CV(load)²; needs the noise of router=noisy_topk, without which a load has no gradient."""


class ZLossConfig(Strict):
    """Router z-loss: mean of logsumexp(logits)² (ST-MoE eq. 5)."""

    coef: NonNegativeFloat = 0.001
    """Weight relative to the cross-entropy per token."""


class EntropyConfig(Strict):
    """Σ p · log p of the mean softmax of the logits, per layer: 0 when one expert has all, -log E when balanced.

    sigma-MoE (arXiv 2310.10837, eq. 20 to 21); SwitchAll has it, too.
    """

    coef: NonNegativeFloat = 0.001
    """Weight relative to the cross-entropy per token."""
    scope: Scope = "global"
    """Tokens over which p is the mean: the whole optimizer step, each sequence alone, or one rank's micro-batch (which
    depends on the layout)."""


class DeviceLossConfig(Strict):
    """Load-balance loss over groups of experts instead of experts (DeepSeek-V2, eq. 26 to 28)."""

    coef: NonNegativeFloat = 0.05
    """Weight relative to the cross-entropy per token."""
    devices: PositiveInt = 4
    """Groups D of consecutive experts, a number of its own so that the loss does not depend on parallel.ep."""
    scope: Scope = "sequence"
    """Tokens over which the load is counted."""


class CommunicationLossConfig(Strict):
    """Evens out how many tokens each device receives (DeepSeek-V2, eq. 29 to 31)."""

    coef: NonNegativeFloat = 0.02
    """Weight relative to the cross-entropy per token."""
    devices: PositiveInt = 4
    """Groups D of consecutive experts, a number of its own so that the loss does not depend on parallel.ep."""
    scope: Scope = "sequence"
    """Tokens over which visits are counted."""


class LossFreeConfig(Strict):
    """A bias per expert that only the choice sees, moved against the load after each optimizer step.

    DeepSeek-V3; arXiv 2408.15664, algorithm 1.
    """

    rate: PositiveFloat = 0.001
    """How far the bias moves per optimizer step."""
    update: Literal["sign", "error"] = "sign"
    """By the sign of (mean load - load), or by its size relative to the mean load (softmax scores need that)."""
    freeze_after: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the steps after which the bias stays as it is (DeepSeek-V3: 14.3 of 14.8 trillion tokens, 0.966)."""


class BalanceConfig(Strict):
    """Means that keep the experts' load even, any number of them; null switches one off."""

    aux: AuxLossConfig | None = None
    """Load-balance loss."""
    importance_load: ImportanceLoadConfig | None = None
    """Losses on the variation of importance and load."""
    z_loss: ZLossConfig | None = None
    """Router z-loss."""
    entropy: EntropyConfig | None = None
    """Entropy regulariser."""
    device: DeviceLossConfig | None = None
    """Load-balance loss over devices."""
    communication: CommunicationLossConfig | None = None
    """Balance of what devices receive."""
    loss_free: LossFreeConfig | None = None
    """Bias on the choice."""
