"""Capacity rules as plain loops over a whole batch, and batches to try them on."""

import math
import struct
from typing import Any

import torch
from moe_samples import context_of
from torch import Tensor

from moe_train.config.routing import DeviceCapacityConfig, FactorCapacityConfig
from moe_train.moe.context import Purpose, RoutingContext
from moe_train.moe.queues import admitted_reference
from moe_train.moe.routing import Routing
from moe_train.ops.random import derive_seed, random_bits_reference

POLICIES, ORDERS = ("position", "probability", "random"), ("token", "choice")


def random_routing(num_tokens: int, num_experts: int, top_k: int, seed: int, dtype: torch.dtype) -> Routing:
    """Choices with a preference for low experts; weights of few different values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    bias_E = torch.linspace(2, 0, num_experts, dtype=dtype)
    logits_TE = (torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype) * 2).round() + bias_E.round()
    experts_TK = logits_TE.argsort(dim=1, descending=True, stable=True)[:, :top_k]

    def weigh(experts_TK: Tensor) -> Tensor:
        return logits_TE.gather(1, experts_TK).softmax(dim=1)

    return Routing(logits_TE, logits_TE.softmax(dim=1), logits_TE, experts_TK, weigh(experts_TK), weigh)


def part_of(routing: Routing, tokens: slice) -> Routing:
    """The routing of some of the tokens."""
    logits_TE = routing.logits_TE[tokens]
    tables = (logits_TE, routing.probabilities_TE[tokens], routing.ranking_TE[tokens], routing.experts_TK[tokens])
    return Routing(*tables, routing.weights_TK[tokens], lambda experts_TK: logits_TE.gather(1, experts_TK).softmax(1))


def random_padding(batch: int, length: int, seed: int) -> Tensor:
    """[B, S] bool: sequences of uneven lengths, some without a valid token."""
    lengths_B = torch.randint(0, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) < lengths_B.unsqueeze(1)


def batch_of(
    config: FactorCapacityConfig | DeviceCapacityConfig, seed: int, batch: int = 4, length: int = 6, **context: Any
) -> tuple[Routing, RoutingContext]:
    """A batch of eight experts, two choices and padding; dtype and seeds differ from one to the next."""
    routing = random_routing(batch * length, 8, 2, seed, (torch.float64, torch.float32)[seed % 2])
    return routing, context_of(batch, length, random_padding(batch, length, seed), seed=seed, **context)


def fp32_bits(value: float) -> int:
    """The bits of a number as fp32."""
    bits: int = struct.unpack(">I", struct.pack(">f", value))[0]
    return bits


def groups_by_loop(scope: str, context: RoutingContext) -> list[int]:
    """The group of each token."""
    return [t // context.length if scope == "sequence" else 0 for t in range(context.num_tokens)]


def limits_by_loop(config: Any, context: RoutingContext, top_k: int, destinations: int) -> list[int]:
    """The room of each queue; exact in the sense of Python's float."""
    groups, valid = groups_by_loop(config.scope, context), context.valid_T.tolist()
    limits = []
    for group in range(max(groups) + 1):
        n = sum(1 for t, g in enumerate(groups) if g == group and valid[t])
        limit = math.ceil(config.factor * n * top_k / destinations)
        if isinstance(config, FactorCapacityConfig):
            limit = min(n, max(config.minimum, limit))
        limits += [limit] * destinations
    return limits


def keys_by_loop(config: Any, routing: Routing, context: RoutingContext) -> list[list[int]]:
    """The priority of each choice, larger first, as one number."""
    draws = derive_seed(context.seed, Purpose.OVERFLOW)
    places, (_, top_k) = context.places_T.tolist(), routing.experts_TK.shape
    keys = []
    for t, row in enumerate(routing.weights_TK.tolist()):
        weights = [fp32_bits(weight) for weight in row]
        if isinstance(config, DeviceCapacityConfig):
            keys.append([is_exempt(config, context, t) * 2**40 + weight for weight in weights])
            continue
        bits = [random_bits_reference(draws, places[t] * top_k + k) >> 41 for k in range(top_k)]
        mains = {"position": [0] * top_k, "probability": weights, "random": bits}[config.policy]
        turns = [top_k - k if config.order == "choice" else 0 for k in range(top_k)]
        keys.append([turn * 2**40 + main for turn, main in zip(turns, mains, strict=True)])
    return keys


def is_exempt(config: DeviceCapacityConfig, context: RoutingContext, token: int) -> bool:
    """Whether the token's sequence keeps everything."""
    sequence = int(context.sequences_B[token // context.length])
    bits = random_bits_reference(derive_seed(context.seed, Purpose.EXEMPTION), sequence)
    return ((bits >> 41) + 0.5) * 2.0**-23 < config.exempt_fraction


def kept_by_loop(config: Any, routing: Routing, context: RoutingContext, num_experts: int) -> Tensor:
    """[T, K] bool: who is kept, before any rerouting."""
    by_device = isinstance(config, DeviceCapacityConfig)
    destinations = config.devices if by_device else num_experts
    limits_Q = torch.tensor(limits_by_loop(config, context, routing.experts_TK.shape[1], destinations))
    groups, valid = groups_by_loop(config.scope, context), context.valid_T.tolist()
    queues = [
        [groups[t] * destinations + e * destinations // num_experts if valid[t] else len(limits_Q) for e in row]
        for t, row in enumerate(routing.experts_TK.tolist())
    ]
    kept_TK = admitted_reference(
        torch.tensor(queues), limits_Q, torch.tensor(keys_by_loop(config, routing, context), dtype=torch.int64)
    )
    for t in range(context.num_tokens if by_device else 0):
        kept_TK[t] |= valid[t] and is_exempt(config, context, t)
    return kept_TK
