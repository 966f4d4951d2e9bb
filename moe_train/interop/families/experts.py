"""Feed-forward networks and MoE layers of public classes: names of tensors, and what most classes have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.routing import FactorCapacityConfig, RouterConfig, TopKRouterConfig, TopKSoftmaxRouterConfig
from moe_train.interop.families.base import Reading
from moe_train.interop.families.pieces import stacked, whole
from moe_train.interop.parts import Part
from moe_train.models.build import is_moe_layer, shared_width


@dataclass(frozen=True)
class ExpertNames:
    """What a class calls the tensors of its MoE layers.

    Attributes:
        block: module of the MoE layer within a layer.
        router: the router's projection within it.
        gate: an expert's gate projection; dense layers and shared experts always say gate_proj, up_proj, down_proj.
        up: its up projection.
        down: its down projection.
        shared: module of the shared experts; None: the class has none.
        shared_gate: projection of the gate of the shared experts; None: they have none.
    """

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str | None = None
    shared_gate: str | None = None


def dense_parts(ours: str, theirs: str, dim: int, hidden: int) -> dict[str, list[Part]]:
    """Return the pieces of a gated dense network."""
    return {
        f"{ours}.gate_up.weight": stacked(
            {f"{theirs}.gate_proj.weight": hidden, f"{theirs}.up_proj.weight": hidden}, dim
        ),
        f"{ours}.down.weight": whole(f"{theirs}.down_proj.weight", dim, hidden),
    }


def moe_parts(model: ModelConfig, names: ExpertNames, ours: str, theirs: str, factor: float) -> dict[str, list[Part]]:
    """Return the pieces of a MoE layer whose experts have tensors of their own.

    Args:
        model: the model.
        names: of the class.
        ours: prefix of our names, of the layer's feed-forward part.
        theirs: prefix of the public names, of the layer.
        factor: of the down projections, public to ours.
    """
    ffn, block = model.ffn, f"{theirs}.{names.block}"
    table = {
        f"{ours}.router.weight": whole(f"{block}.{names.router}.weight", ffn.num_experts, model.dim),
        f"{ours}.experts.gate_up_LDF2": [
            Part(
                f"{block}.experts.{expert}.{name}.weight",
                (ffn.expert_dim, model.dim),
                ours=(expert, slice(None), slice(start, start + ffn.expert_dim)),
                transposed=True,
            )
            for expert in range(ffn.num_experts)
            for name, start in ((names.gate, 0), (names.up, ffn.expert_dim))
        ],
        f"{ours}.experts.down_LFD": [
            Part(
                f"{block}.experts.{expert}.{names.down}.weight",
                (model.dim, ffn.expert_dim),
                ours=(expert,),
                transposed=True,
                factor=factor,
            )
            for expert in range(ffn.num_experts)
        ],
    }
    if ffn.num_shared_experts and names.shared is not None:
        table |= dense_parts(f"{ours}.shared", f"{block}.{names.shared}", model.dim, shared_width(ffn))
    if ffn.shared_gate and names.shared_gate is not None:
        table[f"{ours}.shared.token_gate.weight"] = whole(f"{block}.{names.shared_gate}.weight", 1, model.dim)
    return table


def read_balance(reading: Reading) -> dict[str, Any]:
    """Return the keys of `BalanceConfig` that follow from router_aux_loss_coef."""
    coef = reading.number("router_aux_loss_coef")
    return {"aux": {"coef": coef}} if coef > 0 else {}


def public_balance(model: ModelConfig) -> dict[str, Any]:
    """Return router_aux_loss_coef."""
    aux = model.ffn.balance.aux
    return {"router_aux_loss_coef": 0.0 if aux is None else aux.coef}


def is_averaging(router: RouterConfig) -> bool:
    """Whether the weights are a softmax over the chosen experts: the same function in both forms."""
    if isinstance(router, TopKSoftmaxRouterConfig):
        return not router.bias and router.gate_dim is None
    return isinstance(router, TopKRouterConfig) and router.normalize == "selected"


def topk_refusals(model: ModelConfig) -> Iterator[str]:
    """Yield why a class with a softmax router, normalised or not, cannot express a model's router."""
    router = model.ffn.router
    if isinstance(router, TopKSoftmaxRouterConfig):
        if router.bias:
            yield "the router has a bias"
        if router.gate_dim is not None:
            yield "the router has a hidden layer: router.gate_dim"
    elif not isinstance(router, TopKRouterConfig):
        yield f"router.kind={router.kind}"


def averaging_refusals(model: ModelConfig) -> Iterator[str]:
    """Yield why a class whose router always normalises cannot express a model's router."""
    yield from topk_refusals(model)
    router = model.ffn.router
    if isinstance(router, TopKRouterConfig) and router.normalize == "none":
        yield "router.normalize=none: the weights of a token must sum to one"


def uniform_refusals(model: ModelConfig) -> Iterator[str]:
    """Yield why a class whose layers are all MoE cannot express a model's layers."""
    if model.ffn.first_dense:
        yield f"first_dense={model.ffn.first_dense}: all layers must be MoE"
    if model.ffn.every > 1:
        yield f"every={model.ffn.every}: all layers must be MoE"


def expert_refusals(model: ModelConfig, activation: str = "swiglu", bias: bool = False) -> Iterator[str]:
    """Yield why experts cannot be expressed.

    Args:
        model: the model.
        activation: of the class's experts.
        bias: whether they have biases.
    """
    ffn = model.ffn
    found = ffn.expert_activation or ffn.activation
    if found != activation:
        yield f"experts have the activation {found}, not {activation}"
    if ffn.expert_bias != bias:
        yield "experts have no biases" if bias else "experts have biases"
    if isinstance(ffn.capacity, FactorCapacityConfig) and ffn.capacity.eval_factor is not None:
        yield "capacity.eval_factor limits experts in evaluation too"


def dense_refusals(model: ModelConfig) -> Iterator[str]:
    """Yield why dense layers and shared experts cannot be expressed."""
    ffn = model.ffn
    has_dense = any(not is_moe_layer(ffn, layer) for layer in range(model.layers))
    if (has_dense or ffn.num_shared_experts) and ffn.activation != "swiglu":
        yield f"dense networks have the activation {ffn.activation}, not swiglu"


def shared_refusals(model: ModelConfig, names: ExpertNames) -> Iterator[str]:
    """Yield why shared experts cannot be expressed."""
    ffn = model.ffn
    if names.shared is None:
        if ffn.num_shared_experts:
            yield "has shared experts"
        return
    if ffn.num_shared_experts and ffn.shared_gate and names.shared_gate is None:
        yield "shared experts have a gate"
    if ffn.num_shared_experts and not ffn.shared_gate and names.shared_gate is not None:
        yield "shared experts have no gate"
