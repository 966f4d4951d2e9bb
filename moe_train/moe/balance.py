"""How a layer keeps its experts' load even, and what it tells the step about a forward pass.

A layer's forward returns sums over its tokens (`RoutingRecord`); the step adds up what must be known of all ranks and
micro-batches and only then forms the losses. The same sums make the figures of the records.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_train.config.balance import AuxLossConfig, EntropyConfig, ZLossConfig
from moe_train.config.model import FFNConfig
from moe_train.config.routing import GroupLimitedRouterConfig
from moe_train.moe.capacity import Plan
from moe_train.moe.context import RoutingContext
from moe_train.moe.losses import BalanceLoss, EntropyLoss, RoutedTokens, ShareLoss, VariationLoss, ZLoss
from moe_train.moe.queues import count
from moe_train.moe.record import LayerRecord
from moe_train.moe.routing import Routing
from moe_train.moe.specialisation import load_balance_variance, specialisation, utilisation


@dataclass(frozen=True)
class Balance:
    """The balance losses of a layer, and the bias of its router.

    No-op experts are balanced as the others are: even load is a share of Z / (E + Z) for all Z of them.

    Attributes:
        ffn: the layer's configuration.
        heads: of attention, whose experts these are, with a router each; None: the layer is a feed-forward one.
    """

    ffn: FFNConfig
    heads: int | None = None

    @property
    def num_noops(self) -> int:
        """No-op experts of the layer; heads have none."""
        return self.ffn.num_noop_experts if self.heads is None else 0

    @cached_property
    def losses(self) -> tuple[BalanceLoss, ...]:
        """The losses. Always measured, with weight 0 when off: load balance and z; of heads, the entropy."""
        config, num_choices = self.ffn.balance, self.ffn.num_experts + self.num_noops
        if self.heads is not None:
            # No others: records name a mean over layers, and what balances the feed-forward ones is not for these.
            entropy = config.entropy or EntropyConfig(coef=0.0)
            return (EntropyLoss(entropy.coef, entropy.scope, self.heads),)
        aux, z = config.aux or AuxLossConfig(coef=0.0), config.z_loss or ZLossConfig(coef=0.0)
        found: list[BalanceLoss] = [ShareLoss("aux_loss", aux.coef, aux.scope, num_choices), ZLoss(z.coef)]
        if config.importance_load is not None:
            found.append(VariationLoss("importance_loss", config.importance_load.importance_coef, "importance"))
            found.append(VariationLoss("load_loss", config.importance_load.load_coef, "load"))
        if config.entropy is not None:
            found.append(EntropyLoss(config.entropy.coef, config.entropy.scope))
        if config.device is not None:
            found.append(ShareLoss("device_loss", config.device.coef, config.device.scope, config.device.devices))
        if config.communication is not None:
            coef, scope, devices = config.communication.coef, config.communication.scope, config.communication.devices
            found.append(ShareLoss("communication_loss", coef, scope, devices, self.most_visits(devices)))
        return tuple(found)

    def most_visits(self, devices: int) -> int:
        """Return how many of ``devices`` a token may visit: M of DeepSeek-V2, eq. 30."""
        router = self.ffn.router
        groups = router.top_groups if isinstance(router, GroupLimitedRouterConfig) else self.ffn.top_k
        return min(groups, self.ffn.top_k, devices)

    @property
    def needs_totals(self) -> bool:
        """Whether the gradient of a loss depends on statistics of the whole optimizer step."""
        return any(loss.needs_totals and loss.coef > 0.0 for loss in self.losses)

    def share(self, record: LayerRecord, totals: tuple[Tensor, ...]) -> Tensor:
        """Return a scalar whose gradient is this record's part of that of the weighted losses, times n.

        Args:
            record: one forward pass on this rank.
            totals: its statistics added up over the whole step; looked at only where a loss needs them.
        """
        total = record.statistics[0].new_zeros(())
        for loss, local, whole in zip(self.losses, record.statistics, totals, strict=True):
            if loss.coef == 0.0:
                continue
            total = total + loss.coef * (linearised(loss, local, whole) if loss.needs_totals else local.sum())
        return total

    def values(self, totals: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return n times each unweighted loss, by name, from the statistics of the whole step."""
        return {loss.name: loss.value(total) for loss, total in zip(self.losses, totals, strict=True)}

    def bias_change(self, counts_E: Tensor) -> Tensor:
        """Return what the step adds to the bias on the choice [E] (arXiv 2408.15664, algorithm 1).

        An expert with less than the mean load gets more: the other sign would drive all tokens to one expert.

        Args:
            counts_E: [E] assignments of the whole optimizer step, before drops; no-op experts included.
        """
        config = self.ffn.balance.loss_free
        assert config is not None, "only loss-free balancing moves a bias"
        mean = counts_E.to(torch.float64).mean()
        lacking_E = mean - counts_E
        step_E = lacking_E.sign() if config.update == "sign" else lacking_E / mean.clamp(min=1e-9)
        return config.rate * step_E


def linearised(loss: BalanceLoss, local: Tensor, totals: Tensor) -> Tensor:
    """Return slope(totals) · local: a scalar with the gradient that the loss of the totals has through ``local``.

    Its value has no meaning: the reported loss is formed from the totals.
    """
    with torch.enable_grad():
        at = totals.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss.value(at), at)
    return (slope * local).sum()


@dataclass(frozen=True)
class RoutingRecord(LayerRecord):
    """What one layer's router did with the valid tokens of one forward pass.

    Attributes:
        counts_E: [E] int64, assignments per expert, before any is dropped; none of no-op experts.
        dropped_capacity: scalar int64, assignments for which their expert had no room.
        dropped_device: scalar int64, assignments beyond a device's budget.
        dropped_router: scalar int64, choices that the router itself gave up.
        rerouted: scalar int64, assignments that went to another expert for want of room.
        entropy_sum: scalar fp64, summed entropy of the router's probabilities, in nats.
    """

    counts_E: Tensor
    dropped_capacity: Tensor
    dropped_device: Tensor
    dropped_router: Tensor
    rerouted: Tensor
    entropy_sum: Tensor

    @staticmethod
    def of(routing: Routing, plan: Plan, context: RoutingContext, balance: Balance) -> RoutingRecord:
        """Sum up one forward pass."""
        tokens = RoutedTokens(routing, context)
        num_experts = len(tokens.assigned_E) - balance.num_noops
        counts_E, idle_Z = torch.split(tokens.assigned_E, [num_experts, balance.num_noops])
        declined = tokens.chosen_TK & routing.declined_TK if routing.declined_TK is not None else None
        given_up = tokens.assigned_E.new_zeros(()) if declined is None else declined.sum()
        overflow = counts_E.sum() - given_up - plan.kept_TK.sum()  # padding is never kept
        none = torch.zeros_like(overflow)
        probabilities_TE = routing.probabilities_TE.detach()
        entropy_T = -torch.xlogy(probabilities_TE, probabilities_TE).sum(dim=1)
        record = RoutingRecord(
            tokens=context.valid_T.sum(),
            counts_E=counts_E,
            dropped_capacity=none if plan.device_limited else overflow,
            dropped_device=overflow if plan.device_limited else none,
            dropped_router=given_up,
            rerouted=none if plan.rerouted_TK is None else plan.rerouted_TK.sum(),
            entropy_sum=(entropy_T * context.valid_T).sum(dtype=torch.float64),
            statistics=tuple(loss.measure(tokens) for loss in balance.losses),
        )
        if routing.last_BE is not None:
            return TakingRecord.extended(record, routing.last_BE)
        if context.classes_B is not None and balance.heads is None and not balance.num_noops:
            return ClassRecord.extended(record, tokens)
        return NoopRecord(**vars(record), idle_Z=idle_Z) if balance.num_noops else record

    @property
    def choices_E(self) -> Tensor:
        """[E] int64: assignments of all that a token may choose."""
        return self.counts_E

    def figures(self) -> dict[str, object]:
        """Return what is written down of the layer.

        ``load``: share of assignments per expert, before drops. ``dropped_fraction``: share that no expert computed,
        and by cause: no room at the expert, over a device's budget, given up by the router. ``rerouted_fraction``:
        share that went to another expert for want of room. ``max_violation``: fullest expert over the mean, minus one
        (arXiv 2408.15664, eq. 4). ``entropy``: of the router's probabilities, mean over tokens, in nats.
        """
        assignments = self.choices_E.sum().clamp(min=1)
        load_E = self.choices_E / assignments
        by_cause = [self.dropped_capacity, self.dropped_device, self.dropped_router]
        capacity, device, router = ((dropped / assignments).item() for dropped in by_cause)
        return {
            "load": load_E.tolist(),
            "dropped_fraction": capacity + device + router,
            "dropped_capacity_fraction": capacity,
            "dropped_device_fraction": device,
            "dropped_router_fraction": router,
            "rerouted_fraction": (self.rerouted / assignments).item(),
            "max_violation": (load_E.max() * load_E.numel() - 1).item(),
            "entropy": (self.entropy_sum / self.tokens.clamp(min=1)).item(),
            "dead_experts": int((self.counts_E == 0).sum()),
        }


@dataclass(frozen=True)
class NoopRecord(RoutingRecord):
    """The same of a layer with no-op experts.

    Attributes:
        idle_Z: [Z] int64, choices of each no-op expert; of no kind of drop, as nothing was to be computed.
    """

    idle_Z: Tensor

    @property
    def choices_E(self) -> Tensor:
        """[E + Z] int64: assignments of all that a token may choose."""
        return torch.cat([self.counts_E, self.idle_Z])

    def figures(self) -> dict[str, object]:
        """Return what is written down: shares are of all E + Z; ``noop_share``: the choices that compute nothing."""
        choices = self.choices_E.sum().clamp(min=1)
        return super().figures() | {"noop_share": (self.idle_Z.sum() / choices).item()}


@dataclass(frozen=True)
class ClassRecord(RoutingRecord):
    """The same of a layer whose tokens' sequences have classes.

    Attributes:
        by_class_CE: [C, E] int64, tokens by the class of their text and by the expert that is their first choice;
            those of texts without a class are left out.
        gate_sum_E: [E] fp64, over all valid tokens the sum of each expert's weight, which is zero where it is not
            chosen; before any assignment is dropped.
    """

    by_class_CE: Tensor
    gate_sum_E: Tensor

    @staticmethod
    def extended(record: RoutingRecord, tokens: RoutedTokens) -> ClassRecord:
        """Return the record with the sums by class."""
        routing, context = tokens.routing, tokens.context
        num_experts, num_cells = len(record.counts_E), context.num_classes * len(record.counts_E)
        classes_T = context.classes_T
        counted_T = tokens.chosen_TK[:, 0] & (classes_T >= 0)
        cells_T = torch.where(counted_T, classes_T * num_experts + routing.experts_TK[:, 0], num_cells)
        weights_TK = torch.where(tokens.chosen_TK, routing.weights_TK.detach(), 0.0).to(torch.float64)
        gate_sum_E = weights_TK.new_zeros(num_experts)
        return ClassRecord(
            **vars(record),
            by_class_CE=count(cells_T, num_cells).view(context.num_classes, num_experts),
            gate_sum_E=gate_sum_E.scatter_add(0, routing.experts_TK.flatten(), weights_TK.flatten()),
        )

    def figures(self) -> dict[str, object]:
        """Return what is written down: beside the above, how the experts share the classes (`moe.specialisation`).

        ``by_class``: the counts, a row per class. ``utilisation``: share of the first choices per expert.
        ``specialisation``: SI, null where it is undefined. ``load_balance_variance``: of the experts' mean weights.
        """
        return super().figures() | {
            "by_class": self.by_class_CE.to(torch.int64).tolist(),
            "utilisation": utilisation(self.by_class_CE).tolist(),
            "specialisation": specialisation(self.by_class_CE),
            "load_balance_variance": load_balance_variance(self.gate_sum_E / self.tokens.clamp(min=1)),
        }


@dataclass(frozen=True)
class TakingRecord(RoutingRecord):
    """The same of a layer whose experts take tokens, and learn a threshold from what they took.

    Attributes:
        last_sum_E: [E] fp64, over sequences the score of the last token that each expert took.
        sequences_E: [E] int64, sequences of which it took one.
    """

    last_sum_E: Tensor
    sequences_E: Tensor

    @staticmethod
    def extended(record: RoutingRecord, last_BE: Tensor) -> TakingRecord:
        """Return the record with sums of the last scores [B, E], inf where an expert took no token of a sequence."""
        took_BE = last_BE.isfinite()
        sum_E = torch.where(took_BE, last_BE, 0.0).sum(dim=0, dtype=torch.float64)
        return TakingRecord(**vars(record), last_sum_E=sum_E, sequences_E=took_BE.sum(dim=0))
