"""A public folder streamed into the tensors of a layout: each rank reads its own experts, one piece at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_train.checkpoint.agreement import together
from moe_train.config.model import ModelConfig
from moe_train.dist.world import World
from moe_train.errors import CheckpointError, DataError, Problem
from moe_train.interop.agreement import reading, shortened
from moe_train.interop.families.base import Family
from moe_train.interop.folder import PublicFolder
from moe_train.interop.parts import Parts
from moe_train.interop.pieces import Held, from_public, require_cover, whole_shape

ROTARY = re.compile(r".*\brotary_emb\.inv_freq")
"""Frequencies that old files hold and that follow from config.json."""
LAYER = re.compile(r"model\.layers\.(\d+)\..*")
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding to a number format, with a little room for the factor of a part."""
OTHER_MODEL = "the folder holds another model than the configuration says; model.adopt=true takes the folder's"
Constants = Mapping[str, tuple[tuple[int, ...], float]]
"""Public tensors that our model has no place for, by name: shape, and the one value that all entries must have."""


@dataclass(frozen=True)
class Expected:
    """What a folder should hold.

    Attributes:
        parts: where our tensors lie in it.
        constants: tensors that may be missing; those that are there must have this value everywhere.
        layers: blocks of the model; layers after them are for multi-token prediction, and unless the table names them
            they are passed over. None: the names of layers mean nothing here.
        fresh: names of our tensors that keep their values when the table has no parts for them.
    """

    parts: Parts
    constants: Constants = field(default_factory=dict)
    layers: int | None = None
    fresh: Collection[str] = ()

    def is_beyond_the_layers(self, name: str) -> bool:
        """Whether a public tensor is of a layer after the blocks."""
        layer = LAYER.fullmatch(name)
        return layer is not None and self.layers is not None and int(layer[1]) >= self.layers


def expected_of(family: Family, model: ModelConfig, vocab_size: int, fresh: Collection[str] = ()) -> Expected:
    """Return what a folder of a family should hold for a model."""
    return Expected(family.parts(model, vocab_size), family.constants(model), model.layers, fresh)


def fill(held: Held, expected: Expected, folder: PublicFolder, world: World) -> None:
    """Overwrite this rank's tensors in place with a folder's values. Collective.

    The values are converted to each tensor's dtype and device. Holds one piece of one public tensor beside the model.

    Raises:
        DataError: on all ranks. Tensors are missing, left over or of other shapes: all are listed and nothing is
            overwritten. Reading failed: the tensors are undefined.
    """
    reading(world, lambda: require_fit(held, expected, folder))
    reading(world, lambda: _each(held, expected, folder, lambda ours, theirs, name: copy_into(ours, theirs)))


def check(held: Held, expected: Expected, folder: PublicFolder, world: World, dtype: torch.dtype) -> None:
    """Compare a folder that was just written with what wrote it. Collective.

    Args:
        held: the tensors that were written.
        expected: the table that they were written with.
        folder: what was written.
        world: the processes.
        dtype: that the weights were rounded to; fp32 or bf16.

    Raises:
        CheckpointError: on all ranks; lists tensors that differ by more than one rounding.
    """
    different: set[str] = set()

    def compare(ours: Tensor, theirs: Tensor, name: str) -> None:
        found = theirs.to(ours.device, ours.dtype)
        # Written so that a value that is not a number counts as different, unless it is so on both sides.
        close = torch.isclose(found, ours, rtol=ROUNDING[dtype], atol=1e-37, equal_nan=True)
        if not bool(close.all()):
            different.add(name)

    def work() -> None:
        require_fit(held, expected, folder)
        _each(held, expected, folder, compare)
        rule = "is not in the files as it is in the model"
        problems = [
            Problem(str(folder.path), None, f"{name} {rule}", "see to the disk and export again")
            for name in sorted(different)
        ]
        if problems:
            raise CheckpointError(shortened(problems, "tensors"))

    together(world, "reading back", work)


def copy_into(ours: Tensor, theirs: Tensor) -> None:
    """Overwrite one of our pieces, in our dtype."""
    ours.copy_(theirs)


@torch.no_grad()
def _each(held: Held, expected: Expected, folder: PublicFolder, visit: Callable[[Tensor, Tensor, str], None]) -> None:
    """Call ``visit(ours, theirs, name)`` for every piece that this rank holds, with theirs as ours should be."""
    for name in held.tensors:
        for part in expected.parts.get(name, ()):
            ours = None if part.copy else held.view(name, part)
            if ours is None:
                continue
            theirs = from_public(folder, part)
            assert theirs.shape == ours.shape, f"{part.name} gives {list(theirs.shape)} to {name}, {list(ours.shape)}"
            if part.factor != 1.0:
                theirs = theirs.to(torch.promote_types(theirs.dtype, ours.dtype)) * part.factor
            visit(ours, theirs, name)


def require_fit(held: Held, expected: Expected, folder: PublicFolder) -> None:
    """Compare table, model and folder before anything is read.

    Raises:
        DataError: lists what is missing, left over or of another shape.
    """
    key = str(folder.path)
    problems = [
        *shortened(_homeless(held, expected, key), "tensors of the model"),
        *shortened(_misfits(expected, folder, key), "tensors"),
        *_left_over(expected, folder),
    ]
    if problems:
        raise DataError(problems)
    for name, tensor in held.tensors.items():
        if name in expected.parts:
            shape = whole_shape(name, tuple(tensor.shape), held.sharded, expected.parts[name])
            require_cover(name, shape, expected.parts[name])


def _homeless(held: Held, expected: Expected, key: str) -> Iterator[Problem]:
    """Yield our tensors that the table has nothing for."""
    for name in held.tensors:
        if name not in expected.parts and name not in expected.fresh:
            yield Problem(key, None, f"such folders have no place for {name} of the model", OTHER_MODEL)


def _misfits(expected: Expected, folder: PublicFolder, key: str) -> Iterator[Problem]:
    """Yield public tensors that are missing or of another shape, and constants of another value."""
    wanted = {part.name: (part.shape, part.copy) for parts in expected.parts.values() for part in parts}
    wanted |= {part.name: (part.shape, False) for parts in expected.parts.values() for part in parts if not part.copy}
    wanted |= {name: (shape, True) for name, (shape, _) in expected.constants.items()}
    for name, (shape, is_optional) in wanted.items():
        found = folder.shapes.get(name)
        if found is None:
            if not is_optional:
                yield Problem(key, None, f"lacks {name}", OTHER_MODEL)
        elif found != tuple(shape):
            yield Problem(key, None, f"{name} has shape {list(found)}, not {list(shape)}", OTHER_MODEL)
        elif name in expected.constants and not bool((folder.read(name) == expected.constants[name][1]).all()):
            rule = f"{name} is not {expected.constants[name][1]:g} everywhere, which the model has no place for"
            yield Problem(
                key, None, rule, "choose a configuration with such a tensor; model.adopt=true takes the folder's"
            )


def _left_over(expected: Expected, folder: PublicFolder) -> list[Problem]:
    """Return one problem with the public tensors that nobody reads: without them the model would be another one."""
    used = {part.name for parts in expected.parts.values() for part in parts} | set(expected.constants)
    left = sorted(name for name in folder.shapes if name not in used and not _is_harmless(name, expected, folder))
    if not left:
        return []
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    rule = f"holds tensors that the model does not: {', '.join(left[:5])}{more}"
    return [Problem(str(folder.path), None, rule, OTHER_MODEL)]


def _is_harmless(name: str, expected: Expected, folder: PublicFolder) -> bool:
    """Whether a tensor may be passed over: it follows from others, or serves training only."""
    if ROTARY.fullmatch(name):
        return True
    if name == "lm_head.weight":
        return "head.weight" not in expected.parts and bool(folder.config.get("tie_word_embeddings"))
    return expected.is_beyond_the_layers(name)
