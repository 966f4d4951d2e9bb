"""Puts experts on disk into a model, and fills the rest of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from moe_train.checkpoint.agreement import together
from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.reader import Checkpoint
from moe_train.checkpoint.state import require_fit
from moe_train.config.inference import OffloadConfig
from moe_train.dist.world import World
from moe_train.inference.offload.cache import Buffers, Cache, Traffic
from moe_train.inference.offload.experts import OffloadedExperts
from moe_train.inference.offload.folder import require_records
from moe_train.inference.offload.record import Form, read_record
from moe_train.inference.offload.source import Source
from moe_train.models.transformer import Transformer
from moe_train.moe.experts import Experts
from moe_train.moe.layer import MoELayer
from moe_train.parallel.state import model_parts

FOLDER = "experts"
"""Of the records, in the folder of a run."""
MIB = 2**20


@dataclass(frozen=True)
class Offloaded:
    """The experts of a model that are on disk.

    Attributes:
        caches: of this rank, one per layer.
        buffers: their memory.
        expert_bytes: size of one expert.
        world: the processes.
    """

    caches: tuple[Cache, ...]
    buffers: Buffers
    expert_bytes: int
    world: World

    def traffic(self) -> Traffic:
        """Return the sums over the layers of this rank."""
        each = [cache.traffic for cache in self.caches]
        return Traffic(*(sum(values) for values in zip(*((t.hits, t.misses, t.read_bytes) for t in each), strict=True)))

    def line(self) -> str:
        """Return in one line what was found in memory and what was read, over all ranks. Collective."""
        found = [some for some in self.world.gather((self.traffic(), self.buffers.made)) if isinstance(some, tuple)]
        hits, misses = sum(t.hits for t, _ in found), sum(t.misses for t, _ in found)
        read_mib = sum(t.read_bytes for t, _ in found) / MIB
        held_mib = max(made for _, made in found) * self.expert_bytes / MIB
        share = hits / max(1, hits + misses)
        return (
            f"experts on disk: {hits} hits, {misses} misses (hit rate {share:.3f}), {read_mib:.1f} MiB read, "
            f"at most {held_mib:.1f} MiB in memory on a rank"
        )


def leave_on_disk(
    model: Transformer, checkpoint: Checkpoint, config: OffloadConfig, run_dir: Path, world: World
) -> Offloaded:
    """Give a model without memory its weights, routed experts excepted: these it reads when it needs them. Collective.

    Args:
        model: on the meta device.
        checkpoint: of its weights.
        config: how many are kept, and where they lie.
        run_dir: the run, whose folder they lie in if nothing is said.
        world: the processes.

    Raises:
        CheckpointError: on all ranks: the checkpoint does not fit the model, or the experts cannot be written.
    """
    parts = model_parts(model)
    metadata = together(world, "reading metadata", lambda: read_metadata(checkpoint.path, checkpoint.manifest))
    together(world, "comparing tensors", lambda: require_fit(metadata, parts))
    folder = run_dir / FOLDER if config.folder is None else Path(config.folder).expanduser()
    layers = {name: (layer, experts) for name, layer, experts in routed_layers(model)}
    identity = sha256(checkpoint.manifest.render().encode()).hexdigest()
    forms = {
        name: form_of(f"{name}.experts", experts, model.config.ffn.num_experts, model.dtype, identity)
        for name, (_, experts) in layers.items()
    }
    source = together(world, "reading metadata", lambda: Source(checkpoint))
    require_records(folder, list(forms.values()), checkpoint.step, source, world)
    first = next(iter(forms.values()))
    assert len({form.tensors for form in forms.values()}) == 1, "layers share memory: their experts have one shape"
    buffers = Buffers(partial(first.empty, world.device))
    caches = tuple(take_place(*own, forms[name], folder, config.cached, buffers) for name, own in layers.items())
    model.to_empty(device=world.device)
    checkpoint.fill(model_parts(model), partial=True)
    return Offloaded(caches, buffers, first.values_bytes, world)


def routed_layers(model: nn.Module) -> Iterator[tuple[str, MoELayer, Experts]]:
    """Yield name, layer and experts where these are feed-forward networks that tokens choose."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and isinstance(module.experts, Experts):
            yield name, module, module.experts


def form_of(name: str, experts: Experts, num_experts: int, dtype: torch.dtype, identity: str) -> Form:
    """Return what the records of a layer look like.

    Args:
        name: of the module with its experts.
        experts: have parameters, maybe without memory.
        num_experts: E over all ranks.
        dtype: of the activations: experts are cast to it before every use in memory, too.
        identity: of the checkpoint.
    """
    tensors = tuple((key, tuple(parameter.shape[1:])) for key, parameter in experts.named_parameters())
    return Form(name, tensors, num_experts, dtype, identity)


def take_place(layer: MoELayer, experts: Experts, form: Form, folder: Path, cached: int, buffers: Buffers) -> Cache:
    """Put experts on disk in the place of a layer's own."""
    held = experts.roles["gate_up_LDF2"].experts

    def load(place: int, into: Sequence[torch.Tensor]) -> None:
        read_record(folder, form, held[place], into)

    cache = Cache(cached, len(held), load, buffers, form.values_bytes)
    layer.add_module("experts", OffloadedExperts(cache, len(held), experts.activation, experts.compute))
    return cache
