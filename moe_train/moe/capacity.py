"""Which assignments are computed: a plan of integers, made before any token moves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.config.routing import CapacityConfig, DeviceCapacityConfig, DroplessConfig, FactorCapacityConfig
from moe_train.dist.peers import Alone, Peers
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.limit import Limit
from moe_train.moe.queues import Priority, Queues, places
from moe_train.moe.reroute import reroute
from moe_train.moe.routing import Routing
from moe_train.ops.keep import decide

WEIGHT_BITS = 31
"""Bits of an fp32 number that is not negative; read as integers, they have the order of the numbers."""
DRAW_BITS = 23
"""Bits of a draw that count: those that a uniform fp32 number would keep."""


@dataclass(frozen=True)
class Slots:
    """Places in a buffer of fixed size in which each expert has a run of its own.

    Attributes:
        slots_TK: [T, K] int64, place of each kept assignment, E · per_expert for the others.
        per_expert: places of each expert; the same on all ranks.
    """

    slots_TK: Tensor
    per_expert: int


@dataclass(frozen=True)
class Plan:
    """What will be computed.

    Attributes:
        experts_TK: [T, K] int64, global expert of each assignment; any for a no-op expert, which is not kept.
        weights_TK: [T, K] its weight, at least fp32, differentiable.
        kept_TK: [T, K] bool; what is not kept contributes nothing, and the residual stream carries the token.
        all_kept: True when kept_TK is known to be all true without looking (no limit, no padding).
        rerouted_TK: [T, K] bool, kept by another expert than the router chose; None: nothing is rerouted.
        device_limited: whether devices had no room for what is missing, not experts.
        slots: places in buffers of fixed size; None: as many assignments travel as there are.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    all_kept: bool
    rerouted_TK: Tensor | None = None
    device_limited: bool = False
    slots: Slots | None = None


@dataclass(frozen=True)
class Admissions:
    """The part of a `Plan` that is decided: integers and booleans, which stay when the rest is computed again.

    Attributes:
        experts_TK: see `Plan`.
        kept_TK: see `Plan`.
        rerouted_TK: see `Plan`.
        slots: see `Plan`.
    """

    experts_TK: Tensor
    kept_TK: Tensor
    rerouted_TK: Tensor | None
    slots: Slots | None


@dataclass(frozen=True)
class Capacity:
    """The rule of a layer.

    Attributes:
        config: kind and factors.
        num_experts: experts E of the layer.
        top_k: choices K per token.
        num_noops: further choices Z of the router, which are nothing to compute: they have no limit.
    """

    config: CapacityConfig
    num_experts: int
    top_k: int
    num_noops: int = 0

    def limit(self, training: bool) -> Limit | None:
        """Return how much an expert, or a device, takes; None: everything."""
        match self.config:
            case DroplessConfig():
                return None
            case FactorCapacityConfig() as config:
                factor = config.factor if training else config.eval_factor
                if factor is None:
                    return None
                return Limit(factor, self.top_k, self.num_experts, minimum=config.minimum, num_noops=self.num_noops)
            case DeviceCapacityConfig() as config:
                return Limit(config.factor, self.top_k, config.devices, per_token=self.top_k) if training else None

    def plan(self, routing: Routing, context: RoutingContext, training: bool) -> Plan:
        """Decide who is kept. Waits for the device only to reroute.

        Args:
            routing: the choices of T = B · S tokens.
            context: the sequences that these tokens are, and the ranks that hold the others.
            training: whether the limits of training hold, or those of evaluation, in which nothing is drawn.
        """
        if self.num_noops == 0:
            return self.admit(routing, context, wanted(routing, context), training)
        ranking_TE = routing.ranking_TE.clone()
        ranking_TE[:, self.num_experts :] = float("-inf")  # nothing is rerouted to where nothing is done
        routing = replace(routing, ranking_TE=ranking_TE)
        wanted_TK = wanted(routing, context) & (routing.experts_TK < self.num_experts)
        plan = self.admit(routing, context, wanted_TK, training)
        return replace(plan, experts_TK=plan.experts_TK.clamp(max=self.num_experts - 1), all_kept=False)

    def admit(self, routing: Routing, context: RoutingContext, wanted_TK: Tensor, training: bool) -> Plan:
        """Decide who of those that ask for an expert [T, K] is kept; see `plan`."""
        limit = self.limit(training)
        match self.config:
            case FactorCapacityConfig() as config if limit is not None:
                return plan_for_experts(config, limit, routing, context, wanted_TK, training)
            case DeviceCapacityConfig() as config if limit is not None:
                kept_TK = decide(lambda: within_budgets(config, limit, self.num_experts, routing, context, wanted_TK))
                return Plan(routing.experts_TK, routing.weights_TK, kept_TK, all_kept=False, device_limited=True)
        all_kept = context.valid_BS is None and routing.chosen_TK is None and routing.declined_TK is None
        return Plan(routing.experts_TK, routing.weights_TK, wanted_TK, all_kept)


def wanted(routing: Routing, context: RoutingContext) -> Tensor:
    """Return [T, K] bool: the choices of valid tokens, without those that the router gave up itself."""
    wanted_TK = context.valid_T.unsqueeze(1).repeat(1, routing.experts_TK.shape[1])
    if routing.chosen_TK is not None:
        wanted_TK = wanted_TK & routing.chosen_TK
    if routing.declined_TK is not None:
        wanted_TK = wanted_TK & ~routing.declined_TK
    return wanted_TK


def queues_of(scope: str, limit: Limit, context: RoutingContext) -> Queues:
    """Return the queues of a scope, which padding neither lengthens nor widens.

    A sequence, and all ranks together, are the same tokens on every layout; those of one rank are not.
    """
    valid_T = context.valid_T
    if scope == "sequence":
        peers: Peers = Alone()
        group_T = torch.arange(len(valid_T), device=valid_T.device) // context.length
        tokens_G = valid_T.view(-1, context.length).sum(dim=1)
    else:
        peers = context.peers if scope == "global" else Alone()
        group_T = torch.zeros_like(valid_T, dtype=torch.int64)
        tokens_G = peers.sum(valid_T.sum().unsqueeze(0))
    limits_Q = limit.of_each(tokens_G).repeat_interleave(limit.num_destinations)
    return Queues(group_T, limit.num_destinations, limits_Q, peers)


def plan_for_experts(
    config: FactorCapacityConfig,
    limit: Limit,
    routing: Routing,
    context: RoutingContext,
    wanted_TK: Tensor,
    training: bool,
) -> Plan:
    """Fill each expert up to its capacity; reroute or drop the rest."""
    admitted = decide(lambda: admissions(config, limit, routing, context, wanted_TK, training))
    weights_TK = routing.weigh(admitted.experts_TK) if config.reroute else routing.weights_TK
    if config.renormalize == "after":
        weights_TK = renormalized(weights_TK, wanted_TK, admitted.kept_TK)
    kept_TK, rerouted_TK = admitted.kept_TK, admitted.rerouted_TK
    return Plan(admitted.experts_TK, weights_TK, kept_TK, all_kept=False, rerouted_TK=rerouted_TK, slots=admitted.slots)


def admissions(
    config: FactorCapacityConfig,
    limit: Limit,
    routing: Routing,
    context: RoutingContext,
    wanted_TK: Tensor,
    training: bool,
) -> Admissions:
    """Decide who is kept where, from what the router wants and the room that experts have."""
    queues = queues_of(config.scope, limit, context)
    experts_TK, rerouted_TK, slots = routing.experts_TK, None, None
    kept_TK = queues.admitted(experts_TK, wanted_TK, priority_of(config, routing, context, training))
    if config.reroute:
        experts_TK, rerouted_TK = reroute(routing.ranking_TE, experts_TK, wanted_TK & ~kept_TK, kept_TK, queues)
        kept_TK = kept_TK | rerouted_TK
    if config.pad:
        num_groups = context.num_tokens // context.length if config.scope == "sequence" else 1
        slots = slots_of(experts_TK, kept_TK, limit, num_groups)
    return Admissions(experts_TK, kept_TK, rerouted_TK, slots)


def priority_of(
    config: FactorCapacityConfig, routing: Routing, context: RoutingContext, training: bool
) -> Priority | None:
    """Return who goes first, or None when that is by token and choice alone.

    By order: earlier choices of all tokens before later ones (GShard, arXiv 2006.16668, algorithm 1). By policy: larger
    weights (Megatron's ``probs``), or a draw (DeepSpeed's random token selection), which in evaluation is not made.
    """
    num_choices = routing.experts_TK.shape[1]
    keys_TK, bits = torch.zeros_like(routing.experts_TK), 0
    if config.policy == "probability":
        keys_TK, bits = weight_keys(routing.weights_TK), WEIGHT_BITS
    elif config.policy == "random" and training:
        keys_TK = (context.bits(Purpose.OVERFLOW, num_choices) >> (64 - DRAW_BITS)) & ((1 << DRAW_BITS) - 1)
        bits = DRAW_BITS
    if config.order == "choice":
        turn_K = torch.arange(num_choices - 1, -1, -1, device=keys_TK.device)
        keys_TK, bits = keys_TK | (turn_K << bits), bits + (num_choices - 1).bit_length()
    return Priority(keys_TK, bits) if bits > 0 else None


def weight_keys(weights_TK: Tensor) -> Tensor:
    """Return integers [T, K] in the order of the weights, which are not negative, as fp32 numbers."""
    return weights_TK.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64)


def within_budgets(
    config: DeviceCapacityConfig,
    limit: Limit,
    num_experts: int,
    routing: Routing,
    context: RoutingContext,
    wanted_TK: Tensor,
) -> Tensor:
    """Return [T, K] bool: what is kept when each device drops its smallest weights (DeepSeek-V2, section 2.2.4).

    Exempt sequences use up room like others, and are kept even where they exceed it.
    """
    exempt_B = context.uniform_per_sequence(Purpose.EXEMPTION) < config.exempt_fraction
    exempt_T1 = exempt_B.repeat_interleave(context.length).unsqueeze(1)
    keys_TK = weight_keys(routing.weights_TK) | (exempt_T1.to(torch.int64) << WEIGHT_BITS)
    devices_TK = routing.experts_TK // (num_experts // config.devices)
    queues = queues_of(config.scope, limit, context)
    return queues.admitted(devices_TK, wanted_TK, Priority(keys_TK, WEIGHT_BITS + 1)) | (wanted_TK & exempt_T1)


def renormalized(weights_TK: Tensor, wanted_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Scale each token's kept weights up to the sum that they had with the dropped ones (DeepSpeed's order).

    A token of which all or nothing is kept stays as it is, in value and gradient; so does one whose survivors weigh
    next to nothing, beside the others or at all: their factor, or its gradient, would not be finite.
    """
    wanted_sum_T1 = (weights_TK * wanted_TK).sum(dim=1, keepdim=True)
    kept_sum_T1 = (weights_TK * kept_TK).sum(dim=1, keepdim=True)
    least_T1 = torch.finfo(weights_TK.dtype).eps * wanted_sum_T1.detach().clamp(min=1.0)
    partly_T1 = decide(lambda: (wanted_TK & ~kept_TK).any(dim=1, keepdim=True) & (kept_sum_T1 > least_T1))
    ratio_T1 = wanted_sum_T1 / torch.where(partly_T1, kept_sum_T1, 1.0)
    return torch.where(partly_T1, weights_TK * ratio_T1, weights_TK)


def slots_of(experts_TK: Tensor, kept_TK: Tensor, limit: Limit, num_groups: int) -> Slots:
    """Give each kept assignment a place: by token, in the run of its expert, long enough for what all groups keep."""
    num_experts = limit.num_destinations
    per_expert = num_groups * limit.of(len(experts_TK) // num_groups)
    places_TK = places(torch.where(kept_TK, experts_TK, num_experts), num_experts)
    slots_TK = torch.where(kept_TK, experts_TK * per_expert + places_TK, num_experts * per_expert)
    return Slots(slots_TK, per_expert)


def is_padded(config: CapacityConfig) -> bool:
    """Return whether plans have slots, for which `exchange_for` must know."""
    return isinstance(config, FactorCapacityConfig) and config.pad
