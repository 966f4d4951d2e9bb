"""Moves experts between ranks at checkpoints, so that every rank has as much to do.

A checkpoint holds tensors by global index, and says which expert is at which place from its step on: so a run that
resumes does what one does that goes on. What a rank has to hold from there it reads from the checkpoint just published.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.reader import Checkpoint
from moe_train.config.model import FFNConfig
from moe_train.config.routing import GroupLimitedRouterConfig, HierarchicalRouterConfig
from moe_train.dist.comm import sum_over
from moe_train.dist.mesh import Mesh
from moe_train.dist.parts import Box, Part
from moe_train.models.transformer import Transformer
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.layer import MoELayer
from moe_train.moe.packing import choose_places, imbalance
from moe_train.moe.placement import set_placement
from moe_train.parallel.engine import Engine
from moe_train.training.tally import Tally


@dataclass(frozen=True)
class Places:
    """What is decided of one layer.

    Attributes:
        loads: assignments of each expert over all ranks since the last decision, before drops.
        before: expert at each place so far.
        after: expert at each place from here on; the same tuple where nothing moves.
        num_ranks: ranks P of an EP group.
    """

    loads: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    num_ranks: int

    @property
    def moved(self) -> list[int]:
        """Places that get another expert."""
        return [place for place, pair in enumerate(zip(self.before, self.after, strict=True)) if pair[0] != pair[1]]

    def imbalance(self, experts: Sequence[int]) -> float:
        """Return largest over mean load of a rank for these experts at the places."""
        return imbalance(self.loads, experts, self.num_ranks)


@dataclass(frozen=True)
class Decision:
    """What is decided at a checkpoint.

    Attributes:
        layers: by the name that records use: ``layer_03``.
        starts_anew: whether loads are counted from zero from here on.
    """

    layers: Mapping[str, Places]
    starts_anew: bool

    @property
    def moves(self) -> bool:
        """Whether any expert moves."""
        return any(places.moved for places in self.layers.values())

    def state(self) -> dict[str, Any]:
        """Return what the checkpoint says: layout, expert at each place, loads counted so far."""
        return {
            "ep": max((places.num_ranks for places in self.layers.values()), default=1),
            "placement": {name: list(places.after) for name, places in self.layers.items()},
            "loads": {} if self.starts_anew else {name: list(places.loads) for name, places in self.layers.items()},
        }

    def event(self, step: int) -> dict[str, object]:
        """Return the event to record once the decision is carried out.

        Per layer ``measured``, the imbalance of the steps behind; ``fixed``, what it would have been with each expert
        at the place of its index; ``predicted``, what it would have been at the new places. Then the experts there.
        """
        figures = {
            "measured": {name: places.imbalance(places.before) for name, places in self.layers.items()},
            "fixed": {name: places.imbalance(range(len(places.loads))) for name, places in self.layers.items()},
            "predicted": {name: places.imbalance(places.after) for name, places in self.layers.items()},
        }
        means = {key: sum(found.values()) / max(1, len(found)) for key, found in figures.items()}
        moved = sum(len(places.moved) for places in self.layers.values())
        message = (
            f"fullest rank {means['measured']:.2f} times the mean since the last checkpoint "
            f"(experts at fixed places: {means['fixed']:.2f}); {moved} experts move, expected: {means['predicted']:.2f}"
        )
        return placement_event(step, self.state(), message) | figures | {"moved": moved}


def placement_event(step: int, state: Mapping[str, Any], message: str) -> dict[str, object]:
    """Return the event that says where experts are from a step on."""
    event = {"kind": "event", "step": step, "event": "placement", "message": message}
    return event | {"ep": state["ep"], "experts": state["placement"]}


class Rebalancer:
    """The places of a model's experts over a run. All ranks make one and call its methods at the same points.

    Args:
        engine: model and optimizer.
        mesh: the groups.
    """

    def __init__(self, engine: Engine, mesh: Mesh) -> None:
        self.engine, self.mesh = engine, mesh
        self.layers = routed_layers(engine.model)
        self.num_blocks = blocks_of(engine.model.config.ffn, mesh.layout.ep)
        self.counts_ME: Tensor | None = None
        """int64, assignments here since the last decision per routed layer and expert; None before the first step."""

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(next(iter(self.layers.values())).experts.parameters()).device

    def observe(self, tally: Tally) -> None:
        """Count the assignments of a step. Neither travels nor waits for the device."""
        counts = [
            record.counts_E
            for key, record in zip(tally.layers, tally.records, strict=True)
            if isinstance(record, RoutingRecord) and not key.part  # the experts of an attention stay
        ]
        counts_ME = torch.stack(counts)
        self.counts_ME = counts_ME if self.counts_ME is None else self.counts_ME + counts_ME

    def loads(self) -> list[list[int]]:
        """Return the assignments of all ranks since the last decision, per layer and expert. Collective."""
        num_experts = self.engine.model.config.ffn.num_experts
        none_ME = torch.zeros(len(self.layers), num_experts, dtype=torch.int64, device=self.device)
        total_ME = sum_over(none_ME if self.counts_ME is None else self.counts_ME, self.mesh.world)
        return [[int(load) for load in row] for row in total_ME.tolist()]

    def decide(self, chooses: bool) -> Decision:
        """Return where experts go, before the checkpoint is saved; changes nothing. Collective.

        Args:
            chooses: whether the places may change here: at the steps of ``checkpoint.every`` and no others, also when
                the run ends there, or a resumed run would do otherwise than one that was never interrupted.
        """
        ranks, layers = self.mesh.layout.ep, {}
        for (name, layer), loads in zip(self.layers.items(), self.loads(), strict=True):
            before = layer.placement.experts
            after = tuple(choose_places(loads, before, ranks, self.num_blocks)) if chooses else before
            layers[name] = Places(tuple(loads), before, after, ranks)
        return Decision(layers, starts_anew=chooses)

    def carry_out(self, decision: Decision, checkpoint: Checkpoint | None) -> int:
        """Move the experts, and count from zero. Collective.

        Args:
            decision: of all ranks alike.
            checkpoint: of this very step; None where nothing moves.

        Returns:
            Bytes that all ranks read.

        Raises:
            CheckpointError: on all ranks; it could not be read, and the state is undefined: the run has to end.
        """
        if decision.starts_anew:
            self.counts_ME = None
        if not decision.moves:
            return 0
        assert checkpoint is not None, "experts move by way of a checkpoint"
        for name, places in decision.layers.items():
            set_placement(self.layers[name], places.after)
        parts = self.engine.parts()
        arrived = self.arrived(parts, decision)
        checkpoint.fill(arrived, partial=True)
        self.engine.adopt(parts)
        read = sum(box.values.nbytes for part in arrived.values() for box in part.boxes)
        return int(sum_over(torch.tensor(read, device=self.device), self.mesh.world))

    def arrived(self, parts: Mapping[str, Part], decision: Decision) -> dict[str, Part]:
        """Return of the state to save what belongs to experts at places that changed; the same keys on all ranks."""
        found: dict[str, Part] = {}
        for prefix, name in self.prefixes().items():
            places = decision.layers[name]
            experts = {places.after[place] for place in places.moved}
            own = {key: part for key, part in parts.items() if key.partition(".")[2].startswith(prefix) and part.shape}
            found |= {key: restricted(part, experts) for key, part in own.items() if experts}
        return found

    def prefixes(self) -> dict[str, str]:
        """Return the layers' names by what the names of their experts' parameters start with."""
        names = {id(layer.experts): name for name, layer in self.layers.items()}
        modules = self.engine.model.named_modules()
        return {f"{path}.": names[id(module)] for path, module in modules if id(module) in names}

    def restore(self, saved: Mapping[str, Any], is_leader: bool) -> bool:
        """Take places and loads from what a checkpoint says (`Decision.state`), before its tensors are read.

        Args:
            saved: empty for a run that never moved experts.
            is_leader: on one rank, which takes the loads of all.

        Returns:
            Whether the places are the saved ones; at another EP size every expert starts at the place of its index.
        """
        if saved.get("ep") != self.mesh.layout.ep or saved["placement"].keys() != self.layers.keys():
            return False
        for name, layer in self.layers.items():
            set_placement(layer, saved["placement"][name])
        loads = [saved["loads"][name] for name in self.layers] if saved["loads"] and is_leader else None
        self.counts_ME = None if loads is None else torch.tensor(loads, device=self.device)
        return True


def routed_layers(model: Transformer) -> dict[str, MoELayer]:
    """Return the layers that route, by the name that records use."""
    return {f"layer_{depth:02d}": layer for depth, layer in model.moe_layers.items() if isinstance(layer, MoELayer)}


def blocks_of(ffn: FFNConfig, ep: int) -> int:
    """Return the blocks of ranks that experts do not leave.

    A group-limited router bounds the groups of experts that a token visits, and so the nodes, as long as each group
    stays on ranks of its own (DeepSeek-V3, section 2.1.2). Where a group is no more than a rank that leaves nothing to
    even out, and experts go anywhere. Not so where the first level of a hierarchical router is mapped on ranks: its
    groups bound the ranks that a token visits, and no expert leaves the ranks of its group.
    """
    router = ffn.router
    if isinstance(router, HierarchicalRouterConfig) and router.groups % ep == 0:
        return ep
    if not isinstance(router, GroupLimitedRouterConfig | HierarchicalRouterConfig):
        return 1
    return router.groups if router.groups < ep and ep % router.groups == 0 else 1


def restricted(part: Part, experts: Collection[int]) -> Part:
    """Return what a part has of these experts, along its first dimension."""
    return Part(part.shape, tuple(piece for box in part.boxes for piece in runs(box, experts)))


def runs(box: Box, experts: Collection[int]) -> Iterator[Box]:
    """Yield the longest pieces of a box whose experts are all among these."""
    first, length = box.offsets[0], box.values.shape[0]
    start = 0
    for row in range(length + 1):
        if row == length or first + row not in experts:
            if row > start:
                yield Box(box.values[start:row], (first + start, *box.offsets[1:]))
            start = row + 1
