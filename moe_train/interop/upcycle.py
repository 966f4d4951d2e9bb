"""A dense model made into experts, so that the first forward pass equals the dense one.

Sparse upcycling (arXiv 2212.05055) copies the dense feed-forward network into every expert. With narrower experts each
copy is cut into segments (granular upcycling, arXiv 2410.07524, section 3.2): the router rows of a copy's segments are
equal, so that a token always visits all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import (
    GroupLimitedRouterConfig,
    GShardRouterConfig,
    HashRouterConfig,
    NoisyTopKRouterConfig,
    SigmoidRouterConfig,
    TopKRouterConfig,
    TopKSoftmaxRouterConfig,
)
from moe_train.interop.parts import Part, Parts
from moe_train.models.build import is_moe_layer, shared_width
from moe_train.models.initialise import draw
from moe_train.moe.roles import Role
from moe_train.ops.activation import GATED


@dataclass(frozen=True)
class Segments:
    """How a dense network of width F becomes experts.

    Expert e is segment e mod m of copy e div m; the shared experts take what lies before the segments.

    Attributes:
        hidden_dim: F.
        shared_dim: joint width of the shared experts.
        expert_dim: width of a segment.
        number: m, segments of a copy: F = shared_dim + m · expert_dim.
        factor: what the experts' second projection is multiplied with, so that weights that add up to the router's
            scale over all segments of a token's copies give the sum of one copy.
    """

    hidden_dim: int
    shared_dim: int
    expert_dim: int
    number: int
    factor: float

    def columns(self, expert: int) -> slice:
        """Return the hidden units of the dense network that an expert takes."""
        start = self.shared_dim + expert % self.number * self.expert_dim
        return slice(start, start + self.expert_dim)


def dense_twin(model: ModelConfig, hidden_dim: int) -> ModelConfig:
    """Return the dense model of which a MoE model is made."""
    ffn = FFNConfig(hidden_dim=hidden_dim, activation=model.ffn.activation)
    return model.model_copy(update={"ffn": ffn, "mtp": type(model.mtp)()})


def upcycle_refusals(model: ModelConfig, hidden_dim: int) -> list[str]:
    """Return why the first forward pass of a MoE model could not equal that of a dense one of width ``hidden_dim``."""
    if model.ffn.graph is not None:
        return ["experts that are coupled by a graph change what each of them computed: no copies give the dense model"]
    if model.depth.kind != "full":
        return ["a block that takes only some tokens is not made of a dense one: set model.depth.kind=full"]
    return [*width_refusals(model, hidden_dim), *weight_refusals(model.ffn)]


def width_refusals(model: ModelConfig, hidden_dim: int) -> Iterator[str]:
    """Yield what is wrong with the widths and activations of the experts."""
    ffn = model.ffn
    rest = hidden_dim - shared_width(ffn)
    if rest < ffn.expert_dim or rest % ffn.expert_dim:
        yield (
            f"the dense width {hidden_dim} is not that of the shared experts, {shared_width(ffn)}, and a multiple of "
            f"model.ffn.expert_dim={ffn.expert_dim}"
        )
        return
    number = rest // ffn.expert_dim
    for key in ("num_experts", "top_k"):
        if getattr(ffn, key) % number:
            yield f"model.ffn.{key}={getattr(ffn, key)} is no multiple of the {number} segments of a copy"
    if number > 1 and not keeps_segments_together(ffn, number):
        yield f"router {ffn.router.kind} does not choose the {number} segments of a copy together"
    if (ffn.expert_activation or ffn.activation) != ffn.activation:
        yield f"the experts' activation {ffn.expert_activation} is not that of the dense network, {ffn.activation}"
    has_dense = any(not is_moe_layer(ffn, layer) for layer in range(model.layers))
    if has_dense and ffn.hidden_dim != hidden_dim:
        yield f"model.ffn.hidden_dim={ffn.hidden_dim} of the layers that stay dense is not {hidden_dim}"


def weight_refusals(ffn: FFNConfig) -> Iterator[str]:
    """Yield why the weights of a token's experts do not add up to a constant."""
    if ffn.shared_gate:
        yield "the gate of the shared experts weakens them"
    if ffn.num_noop_experts:
        yield "a token's share of the experts that do nothing is missing"
    match ffn.router:
        case TopKSoftmaxRouterConfig() | NoisyTopKRouterConfig() | HashRouterConfig():
            return
        case GShardRouterConfig(dispatch_threshold=None):
            return
        case TopKRouterConfig() | SigmoidRouterConfig() | GroupLimitedRouterConfig() as router:
            if router.normalize == "none":
                yield "the weights of a token's experts do not add up to a constant: set model.ffn.router.normalize"
        case _:
            yield f"the weights of router {ffn.router.kind} do not add up to a constant"


def keeps_segments_together(ffn: FFNConfig, number: int) -> bool:
    """Whether experts with equal router rows are chosen together."""
    match ffn.router:
        case TopKRouterConfig() | TopKSoftmaxRouterConfig() | SigmoidRouterConfig():
            return True
        case GroupLimitedRouterConfig(groups=groups):
            return ffn.num_experts // groups % number == 0
        case _:
            return False


def segments_of(model: ModelConfig, hidden_dim: int) -> Segments:
    """Return how a dense network is cut; the model has no `upcycle_refusals`."""
    ffn = model.ffn
    shared_dim = shared_width(ffn)
    number = (hidden_dim - shared_dim) // ffn.expert_dim
    return Segments(hidden_dim, shared_dim, ffn.expert_dim, number, number / ffn.router.scale)


def upcycled_parts(model: ModelConfig, dense: Parts, segments: Segments) -> Parts:
    """Return the parts of a MoE model in a dense checkpoint; what they do not name (routers) keeps its first values.

    Args:
        model: the MoE model.
        dense: parts of its dense twin.
        segments: how the dense networks are cut.
    """
    parts: dict[str, Sequence[Part]] = {}
    for name, pieces in dense.items():
        layer = layer_of(name)
        if layer is None or ".ffn." not in name or not is_moe_layer(model.ffn, layer):
            parts[name] = pieces
    gated = model.ffn.activation in GATED
    for layer in range(model.layers):
        if is_moe_layer(model.ffn, layer):
            prefix = f"blocks.{layer}.ffn."
            network = Network(dense[f"{prefix}gate_up.weight"], dense[f"{prefix}down.weight"], segments, gated)
            parts |= {f"{prefix}{name}": pieces for name, pieces in network.parts(model.ffn.num_experts).items()}
    return parts


def layer_of(name: str) -> int | None:
    """Return the depth of the block in a parameter's name, or None."""
    section, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if section == "blocks" else None


@dataclass(frozen=True)
class Network:
    """A dense feed-forward network in a checkpoint, to be cut.

    Attributes:
        gate_up: parts of the first projection, [2F, D] or [F, D].
        down: parts of the second, [D, F].
        segments: how it is cut.
        gated: whether the first projection is gate and up.
    """

    gate_up: Sequence[Part]
    down: Sequence[Part]
    segments: Segments
    gated: bool

    def parts(self, num_experts: int) -> dict[str, list[Part]]:
        """Return the parts of a MoE layer by their names in it."""
        found: dict[str, list[Part]] = {"experts.gate_up_LDF2": [], "experts.down_LFD": []}
        for expert in range(num_experts):
            hidden = self.segments.columns(expert)
            for place, part in self.first_projection(hidden):
                found["experts.gate_up_LDF2"].append(replace(part, ours=(expert, slice(None), place), transposed=True))
            for part in self.second_projection(hidden):
                scaled = replace(part, ours=(expert,), transposed=True, factor=part.factor * self.segments.factor)
                found["experts.down_LFD"].append(scaled)
        if self.segments.shared_dim:
            hidden = slice(0, self.segments.shared_dim)
            pieces = self.first_projection(hidden)
            found["shared.gate_up.weight"] = [replace(part, ours=(place, slice(None))) for place, part in pieces]
            found["shared.down.weight"] = self.second_projection(hidden)
        return found

    def first_projection(self, hidden: slice) -> list[tuple[slice, Part]]:
        """Return for gate and up the place in the cut projection, and the rows that belong there."""
        width = hidden.stop - hidden.start
        starts = [0, self.segments.hidden_dim] if self.gated else [0]
        return [
            (slice(half * width, (half + 1) * width), rows_of(self.gate_up, start + hidden.start, width))
            for half, start in enumerate(starts)
        ]

    def second_projection(self, hidden: slice) -> list[Part]:
        """Return the columns of the second projection that belong to these hidden units."""
        (whole,) = self.down
        assert not whole.theirs and not whole.transposed, f"{whole.name} is no plain [D, F] matrix"
        return [replace(whole, ours=(), theirs=(slice(None), hidden))]


def rows_of(parts: Sequence[Part], first: int, number: int) -> Part:
    """Return the part that is rows ``first`` ... of the [rows, D] matrix that ``parts`` make up."""
    for part in parts:
        assert not part.transposed and part.rows is None, f"{part.name} is no plain matrix"
        start, stop = bounds(part.ours[0] if part.ours else slice(None), part.shape[0])
        if start <= first and first + number <= stop:
            offset, _ = bounds(part.theirs[0] if part.theirs else slice(None), part.shape[0])
            return replace(part, ours=(), theirs=(slice(offset + first - start, offset + first - start + number),))
    raise AssertionError(f"no part holds rows {first} to {first + number}")


def bounds(index: int | slice, size: int) -> tuple[int, int]:
    """Return first row and end of a run of rows."""
    assert isinstance(index, slice) and index.step in (None, 1), "a run of rows"
    start, stop, _ = index.indices(max(size, index.stop or 0))
    return start, stop


@torch.no_grad()
def tie_router_rows(weight_ED: Tensor, number: int) -> None:
    """Make the router's rows [E, D] equal within each run of ``number`` experts: the segments of one copy."""
    if number > 1:
        weight_ED.copy_(weight_ED[::number].repeat_interleave(number, dim=0))


@torch.no_grad()
def add_noise(experts: Mapping[str, tuple[Tensor, Role]], segments: Segments, noise: float, seed: int) -> None:
    """Add normal noise to all copies but the first, relative to the spread of each expert's weights.

    Args:
        experts: by name the expert tensors of this rank, [L, ...], and their roles.
        segments: how the dense networks were cut.
        noise: standard deviation relative to that of the weights.
        seed: the draws depend on it, on the name and on the expert alone: no layout changes them.
    """
    for name, (tensor, role) in experts.items():
        for place, expert in enumerate(role.experts):
            if expert >= segments.number and noise:
                std = noise * float(tensor[place].double().std())
                values = draw(tensor.shape[1:], replace(role, std=std), f"{seed}|upcycle|{name}|{expert}")
                tensor[place] += values.to(tensor)
