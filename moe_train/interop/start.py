"""The first weights of a training, from a folder of ``model.init_from``: the same model, or a dense one upcycled."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.interop.agreement import reading
from moe_train.interop.families.base import Family
from moe_train.interop.folder import PublicFolder
from moe_train.interop.load import OTHER_MODEL, Expected, fill
from moe_train.interop.native import family_in
from moe_train.interop.pieces import held_of
from moe_train.interop.upcycle import (
    Segments,
    add_noise,
    dense_twin,
    segments_of,
    tie_router_rows,
    upcycle_refusals,
    upcycled_parts,
)
from moe_train.models.transformer import Transformer
from moe_train.moe.layer import MoELayer
from moe_train.moe.roles import Kind, roles_of
from moe_train.moe.routers.linear import LinearRouter

logger = logging.getLogger(__name__)

FREE = (
    "init_std",
    "init_from",
    "adopt",
    "upcycle",
    "mtp.coef",
    "mtp.late_coef",
    "mtp.late_after",
    "ffn.balance",
    "ffn.compute",
    "attention.compute",
    "depth.causal_coef",
    "ffn.capacity",
    "ffn.router.jitter",
    "ffn.router.expert_dropout",
    "ffn.graph.adjacency_mean",
    "ffn.graph.adjacency_std",
    "ffn.graph.orthogonality",
    "ffn.graph.chunk_tokens",
    "ffn.graph.recompute",
)
"""Keys of the model that matter in training only: they may differ from the folder's."""


@dataclass(frozen=True)
class Start:
    """How a folder becomes a model's first weights.

    Attributes:
        expected: what the folder should hold, and where it goes.
        segments: how its dense networks are cut into experts; None when it is the same model.
    """

    expected: Expected
    segments: Segments | None


def load_first_weights(model: Transformer, world: World, seed: int) -> None:
    """Overwrite initial values with those of ``model.config.init_from``, streamed. Collective.

    Args:
        model: as this rank holds it, with initial values: routers of upcycled layers keep them.
        world: the processes.
        seed: of the noise of upcycling.

    Raises:
        ConfigError: the folder's model is not the configured one, nor a dense one that can be upcycled to it.
        DataError: the folder is damaged, or lacks tensors.
    """
    config = model.config
    assert config.init_from is not None, "there is nothing to start from"
    path = Path(config.init_from).expanduser()
    folder = reading(world, lambda: PublicFolder.open(path))
    start = agreed_start(config, model.embedding_VD.shape[0], folder, world)
    fill(held_of(model), start.expected, folder, world)
    if start.segments is not None:
        finish_upcycling(model, start.segments, seed)


def agreed_start(config: ModelConfig, vocab_size: int, folder: PublicFolder, world: World) -> Start:
    """Plan the start on every rank; all ranks raise what one finds. Collective."""
    failure: ConfigError | None = None
    start: Start | None = None
    try:
        start = plan_start(config, vocab_size, folder)
    except ConfigError as error:
        failure = error
    world.agree(failure)
    assert start is not None, "all ranks read the same folder"
    return start


def plan_start(config: ModelConfig, vocab_size: int, folder: PublicFolder) -> Start:
    """Return how a folder becomes the configured model.

    Raises:
        ConfigError: it cannot; lists every difference.
    """
    family = family_in(folder.config, folder.path)
    found = family.architecture(folder.config)
    if found.problems:
        raise ConfigError(found.problems)
    theirs = ModelConfig.model_validate(found.model)
    if config.ffn.num_experts and not theirs.ffn.num_experts:
        return plan_upcycling(config, theirs, vocab_size, family)
    require_same(config, vocab_size, found.model, family)
    parts = dict(family.parts(config, vocab_size))
    absent = absent_modules(config, family, folder)
    for name in absent:
        del parts[name]
    return Start(Expected(parts, family.constants(config), config.layers, absent), None)


def absent_modules(config: ModelConfig, family: Family, folder: PublicFolder) -> set[str]:
    """Return our tensors of modules for multi-token prediction that a folder lacks: they keep their first values."""
    present = family.depth_present(config, folder.shapes.keys())
    lacking = tuple(f"mtp.{k}." for k in range(present, config.mtp.depth))
    if lacking:
        logger.warning(
            "%s holds %d of %d modules for multi-token prediction: the others start from random values",
            folder.path,
            present,
            config.mtp.depth,
        )
    return {name for name in family.parts(config, 1) if name.startswith(lacking)} if lacking else set()


def plan_upcycling(config: ModelConfig, theirs: ModelConfig, vocab_size: int, family: Family) -> Start:
    """Return how a dense folder becomes the configured MoE model.

    Raises:
        ConfigError: it cannot, or not so that the first forward pass is the dense model's.
    """
    hidden_dim = theirs.ffn.hidden_dim
    twin, refusals = dense_twin(config, hidden_dim), upcycle_refusals(config, hidden_dim)
    if config.ffn.graph is None:  # else it is no difference between keys that stands in the way
        require_same(twin, vocab_size, theirs.model_dump(), family)
    if refusals:
        remedy = "change it, or start from a model with experts"
        raise ConfigError([Problem("model.init_from", config.init_from, reason, remedy) for reason in refusals])
    segments = segments_of(config, hidden_dim)
    parts = upcycled_parts(config, family.parts(twin, vocab_size), segments)
    return Start(Expected(parts, {}, config.layers, Everything()), segments)


class Everything(frozenset[str]):
    """Contains every name: what a dense folder does not name keeps its first values."""

    def __contains__(self, name: object) -> bool:
        return True


def require_same(stated: ModelConfig, vocab_size: int, theirs: Mapping[str, Any], family: Family) -> None:
    """Compare the configured model with a folder's, both in the form that the folder's family gives them.

    An adopted architecture differs only where the user said so (a longer text, say): there the tensors must fit.

    Raises:
        ConfigError: lists every key that differs, or why the family cannot express the configured model.
    """
    problems = [
        Problem("model", None, f"{family.class_name} cannot be this model: {reason}", OTHER_MODEL)
        for reason in family.refusals(stated)
    ]
    if not problems and not stated.adopt:
        ours = family.architecture(family.public_config(stated, vocab_size)).model
        problems = list(differences(leaves(ours), leaves(dict(theirs))))
    if problems:
        raise ConfigError(problems)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each key of the architecture that differs."""
    remedy = "set it, or take the folder's architecture with model.adopt=true"
    for key in sorted(ours.keys() | theirs.keys()):
        if not is_free(key) and ours.get(key) != theirs.get(key):
            yield Problem(f"model.{key}", ours.get(key), f"is {theirs.get(key)} in model.init_from", remedy)


def is_free(key: str) -> bool:
    """Whether a key of the model matters in training only."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a model's section by dotted key, defaults filled in."""
    whole = ModelConfig.model_validate(section).model_dump(mode="json") if not prefix else section
    found: dict[str, Any] = {}
    for name, value in whole.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def finish_upcycling(model: Transformer, segments: Segments, seed: int) -> None:
    """Tie the router rows of each copy's segments, and add noise to all copies but the first."""
    for layer in model.moe_layers.values():
        if isinstance(layer, MoELayer) and isinstance(layer.router, LinearRouter):
            tie_router_rows(layer.router.weight, segments.number)
    roles, noise = roles_of(model), model.config.upcycle.noise
    own = {name: (parameter, roles[name]) for name, parameter in model.named_parameters() if name.startswith("blocks.")}
    copies = {name: pair for name, pair in own.items() if ".ffn." in name}  # attention may have experts of its own
    weights = {name: pair for name, pair in copies.items() if pair[1].kind is Kind.EXPERT and pair[0].dim() > 2}
    add_noise(weights, segments, noise, seed)
