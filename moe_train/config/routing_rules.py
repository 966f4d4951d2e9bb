"""Rules of routing: which routers, balance methods and capacity rules are possible together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_train.config.model import FFNConfig
from moe_train.config.routing import (
    DeviceCapacityConfig,
    ExpertChoiceRouterConfig,
    FactorCapacityConfig,
    GroupLimitedRouterConfig,
    HierarchicalRouterConfig,
    SigmoidRouterConfig,
    TopKRouterConfig,
)
from moe_train.errors import Problem

ROUTER, BALANCE, CAPACITY = "model.ffn.router", "model.ffn.balance", "model.ffn.capacity"
CHOICES = {"switch": 1, "base": 1, "gshard": 2}
"""Routers that are defined for one number of choices."""
NORMALISING = (TopKRouterConfig, SigmoidRouterConfig, GroupLimitedRouterConfig)
"""Routers whose weights may be divided by their sum."""
LOAD_METHODS = ("aux", "importance_load", "entropy", "device", "communication", "loss_free")
"""What evens out a load; the z-loss does not."""
NO_BIAS = {
    "sinkhorn": "balances the choice itself",
    "base": "balances the choice itself",
    "noisy_topk": "chooses by noisy scores, and its estimate of the load knows no bias",
    "hierarchical": "chooses groups first, which a bias per expert does not move",
}
"""Routers to whose choice no bias is added, and why; expert_choice and hash have reasons against all methods."""
NO_REROUTE = {
    "hash": "it has no order of preference among experts",
    "expert_choice": "an expert takes exactly as many tokens as it has room for",
    "hierarchical": "the weight of an expert holds only within the groups that its token chose",
}
"""Routers whose assignments cannot move to a next-best expert, and why."""
NO_NOOP = {
    "gshard": "gives up second choices by a rule of its own",
    "group_limited": "chooses among groups of experts, and one that does nothing is in none",
    "expert_choice": "lets experts choose tokens: a token that none takes passes them by already",
    "hash": "learns nothing: tokens would pass by at random",
    "sinkhorn": "gives every expert an equal share of the tokens, whether or not they need one",
    "base": "gives every expert an equal share of the tokens, whether or not they need one",
    "hierarchical": "chooses among groups of experts, and one that does nothing is in none",
}
"""Routers whose tokens cannot choose to pass the experts by, and why."""


def routing_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield what is wrong between the fields of a MoE layer."""
    yield from choice_problems(ffn)
    yield from gradient_problems(ffn)
    yield from group_problems(ffn)
    yield from leak_problems(ffn)
    yield from balance_problems(ffn)
    yield from device_problems(ffn)
    yield from capacity_problems(ffn)


def choice_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield what is wrong with the number of choices."""
    if ffn.top_k > ffn.num_experts:
        rule = f"must not exceed model.ffn.num_experts={ffn.num_experts}"
        yield Problem("model.ffn.top_k", ffn.top_k, rule, "lower top_k")
    needed = CHOICES.get(ffn.router.kind, ffn.top_k)
    if ffn.top_k != needed:
        rule = f"router.kind={ffn.router.kind} chooses exactly {needed} expert{'s' if needed > 1 else ''} per token"
        yield Problem("model.ffn.top_k", ffn.top_k, rule, f"set model.ffn.top_k={needed}")


def gradient_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield what leaves a router without gradient: weights that are 1 whatever it thinks.

    Normalised top-1 is a mistake whose remedy costs nothing; where the published formula has no other form, a loss that
    depends on the probabilities may train the router in place of the task.
    """
    router = ffn.router
    if ffn.num_experts + ffn.num_noop_experts == 1:
        return
    if isinstance(router, NORMALISING) and router.normalize == "selected" and ffn.top_k == 1:
        rule = "with top_k=1 every weight becomes 1 and the router gets no gradient from the task"
        yield Problem(f"{ROUTER}.normalize", "selected", rule, f"set {ROUTER}.normalize=none")
    if is_trained_by_balance(ffn):
        return
    remedy = f"or let a loss on the load train it: {BALANCE}.aux.coef=0.01"
    if router.kind in ("topk_softmax", "noisy_topk") and ffn.top_k == 1:
        rule = "the softmax over one chosen expert is 1, so that the router gets no gradient from the task"
        yield Problem("model.ffn.top_k", 1, rule, f"raise top_k, choose model/ffn/router=switch, {remedy}")
    if isinstance(router, HierarchicalRouterConfig):
        if router.top_groups == 1 and router.groups > 1:
            rule = "the weight of one chosen group is 1, so that the choice of groups gets no gradient from the task"
            yield Problem(f"{ROUTER}.top_groups", 1, rule, f"raise it, {remedy}")
        if router.top_groups == ffn.top_k and router.groups < ffn.num_experts:
            rule = "one expert per chosen group has weight 1 in it, so that its choice gets no gradient from the task"
            yield Problem("model.ffn.top_k", ffn.top_k, rule, f"raise it, {remedy}")


def is_trained_by_balance(ffn: FFNConfig) -> bool:
    """Whether a loss on the load has a gradient for the router, whatever the weights are.

    The z-loss does not count: it shrinks all scores and says nothing about where a token should go. Nor does
    importance, the sum of weights, as these are constant here; nor loss_free, which moves its bias without a gradient.
    """
    balance, smooth = ffn.balance, ffn.balance.importance_load
    if smooth is not None and smooth.load_coef > 0 and ffn.router.kind == "noisy_topk":
        return True
    return any(loss is not None and loss.coef > 0 for loss in (balance.aux, balance.device, balance.communication))


def group_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield what is wrong with the groups of experts of a router."""
    router, key = ffn.router, f"{ROUTER}.groups"
    if not isinstance(router, GroupLimitedRouterConfig | HierarchicalRouterConfig):
        return
    if router.top_groups > router.groups:
        rule = f"must not exceed {key}={router.groups}"
        yield Problem(f"{ROUTER}.top_groups", router.top_groups, rule, "lower it")
    if ffn.num_experts % router.groups:
        rule = f"must divide model.ffn.num_experts={ffn.num_experts}"
        yield Problem(key, router.groups, rule, "change one of them")
        return
    size = ffn.num_experts // router.groups
    if isinstance(router, HierarchicalRouterConfig) and ffn.top_k % router.top_groups:
        rule = f"must divide model.ffn.top_k={ffn.top_k}: each chosen group gives equally many experts"
        yield Problem(f"{ROUTER}.top_groups", router.top_groups, rule, "change one of them")
    elif ffn.top_k > router.top_groups * size:
        rule = f"must not exceed {router.top_groups * size}, the experts of {ROUTER}.top_groups={router.top_groups}"
        yield Problem("model.ffn.top_k", ffn.top_k, rule, f"lower it or raise {ROUTER}.top_groups")
    if isinstance(router, GroupLimitedRouterConfig) and router.group_score == "top2" and size < 2:
        rule = f"groups of {size} expert have no two best"
        yield Problem(f"{ROUTER}.group_score", "top2", rule, f"set {ROUTER}.group_score=max or lower {key}")


def leak_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield a problem when experts choose tokens of a causal model without the user's consent.

    Evaluation and generation choose by thresholds and see nothing of the future; training does, and learns to use it.
    """
    router = ffn.router
    if not isinstance(router, ExpertChoiceRouterConfig) or router.allow_future_leak:
        return
    bits = future_leak_bits(ffn.top_k, ffn.num_experts)
    if bits is None:
        amount = f"no bound is known for top_k / num_experts = {ffn.top_k}/{ffn.num_experts} >= 1/2"
    else:
        amount = f"more than {bits:.2f} bits per token can leak"
    rule = (
        "in training later tokens decide whether an earlier one is taken, so that its loss, and the one that looks "
        f"ahead, is too good: {amount}"
    )
    remedy = f"set {ROUTER}.allow_future_leak=true if you know what you measure, or choose another router"
    yield Problem(f"{ROUTER}.kind", router.kind, rule, remedy)


def future_leak_bits(top_k: int, num_experts: int) -> float | None:
    """Return how much expert choice can tell a token of the future: more than K·log2((1 - R) / R) bits, R = K / E.

    The bound (arXiv 2408.15664) is None for R >= 1/2, where the formula gives none.
    """
    ratio = top_k / num_experts
    return top_k * math.log2((1 - ratio) / ratio) if ratio < 0.5 else None


def balance_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield balance methods that cannot do anything with the router."""
    kind, balance = ffn.router.kind, ffn.balance
    chosen = [name for name in type(balance).model_fields if getattr(balance, name) is not None]
    for name in chosen:
        reason = None
        if kind == "hash":
            reason = "hash learns nothing: there is no router to train or to correct"
        elif kind == "expert_choice" and name in LOAD_METHODS:
            reason = "expert_choice gives every expert equally many tokens: there is no load to even out"
        elif name == "loss_free" and kind in NO_BIAS:
            reason = f"a bias on the choice does not fit router.kind={kind}, which {NO_BIAS[kind]}"
        if reason:
            yield Problem(f"{BALANCE}.{name}", None, reason, f"set {BALANCE}.{name}=null")
    load = balance.importance_load
    if load is None or load.load_coef == 0 or kind in ("hash", "expert_choice"):
        return
    key, remedy = f"{BALANCE}.importance_load.load_coef", f"set {BALANCE}.importance_load.load_coef=0"
    if kind != "noisy_topk":
        rule = f"the load of router.kind={kind} has no gradient without the noise of noisy_topk"
        yield Problem(key, load.load_coef, rule, remedy)
    elif ffn.top_k >= ffn.num_experts + ffn.num_noop_experts:
        rule = "with top_k = num_experts all experts are chosen: there is no chance of being chosen to even out"
        yield Problem(key, load.load_coef, rule, remedy)


def device_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield numbers of devices that do not fit the number of experts."""
    sections = {
        f"{BALANCE}.device": ffn.balance.device,
        f"{BALANCE}.communication": ffn.balance.communication,
        CAPACITY: ffn.capacity if isinstance(ffn.capacity, DeviceCapacityConfig) else None,
    }
    for key, section in sections.items():
        if section is not None and ffn.num_experts % section.devices:
            rule = f"must divide model.ffn.num_experts={ffn.num_experts}"
            yield Problem(f"{key}.devices", section.devices, rule, "change one of them")


def capacity_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield capacity rules that do not fit the router or each other."""
    kind, capacity = ffn.router.kind, ffn.capacity
    if kind == "expert_choice" and capacity.kind != "dropless":
        rule = "with router.kind=expert_choice an expert takes a fixed number of tokens: nothing overflows"
        yield Problem(f"{CAPACITY}.kind", capacity.kind, rule, f"set {CAPACITY}.kind=dropless")
        return
    if not isinstance(capacity, FactorCapacityConfig):
        return
    if capacity.reroute and kind in NO_REROUTE:
        rule = f"is not possible with router.kind={kind}: {NO_REROUTE[kind]}"
        yield Problem(f"{CAPACITY}.reroute", True, rule, f"set {CAPACITY}.reroute=false")
    if capacity.pad and capacity.scope == "global":
        rule = "buffers of a fixed size per rank cannot hold a limit that all ranks share"
        remedy = f"set {CAPACITY}.scope=sequence or rank, or {CAPACITY}.pad=false"
        yield Problem(f"{CAPACITY}.pad", True, rule, remedy)


def noop_problems(ffn: FFNConfig) -> Iterator[Problem]:
    """Yield what does not go with experts that do nothing; of any model, also where nothing is routed."""
    key, number = "model.ffn.num_noop_experts", ffn.num_noop_experts
    if not number:
        return
    if ffn.num_experts == 0 or ffn.graph is not None:
        rule = "tokens choose to pass experts by, and here they choose none"
        yield Problem(key, number, rule, "leave it out, or set model.ffn.num_experts and no model.ffn.graph")
        return
    if ffn.router.kind in NO_NOOP:
        rule = f"is not possible with router.kind={ffn.router.kind}, which {NO_NOOP[ffn.router.kind]}"
        remedy = "set it to 0, or choose model/ffn/router=topk, topk_softmax, sigmoid, switch or noisy_topk"
        yield Problem(key, number, rule, remedy)
    rule, remedy = "is about experts on devices, and those that do nothing are on none", f"leave it out, or set {key}=0"
    for name in ("device", "communication"):
        if getattr(ffn.balance, name) is not None:
            yield Problem(f"{BALANCE}.{name}", "set", rule, remedy)
    if ffn.capacity.kind == "device":
        yield Problem(f"{CAPACITY}.kind", "device", rule, f"choose another model/ffn/capacity, or set {key}=0")


def group_layout_problems(ffn: FFNConfig, ep: int) -> Iterator[Problem]:
    """Yield a problem when the first level of a hierarchical router cannot be mapped on ranks."""
    router = ffn.router
    if ep == 1 or ffn.graph is not None or not isinstance(router, HierarchicalRouterConfig):
        return
    if router.groups % ep and ep % router.groups:
        rule = f"must divide, or be a multiple of, {ROUTER}.groups={router.groups}: groups would lie across ranks"
        yield Problem("parallel.ep", ep, rule, f"change one of them, or choose another {ROUTER}")
