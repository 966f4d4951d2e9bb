"""Tells torch.distributed.checkpoint which boxes of which tensors a rank writes, or wants to read.

Its own planners know plain tensors and DTensors; a rank's experts need not lie side by side in the whole, which is
what a DTensor would need. The files are those of torch's own planners: either reads what the other wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_train.dist.parts import Box, Part

Parts: TypeAlias = Mapping[str, Part]


class PartWriter(DefaultSavePlanner):
    """Plans to write every box; where several ranks hold the same, torch lets one of them write it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Return this rank's boxes."""
        parts = cast(Parts, self.state_dict)
        self.plan = SavePlan([item for key, part in parts.items() for item in write_items(key, part)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the values of a planned box."""
        return box_at(cast(Parts, self.state_dict), index).values

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return the values as they are."""
        return object


class PartReader(DefaultLoadPlanner):
    """Plans to read what overlaps with the boxes of this rank, and nothing else."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the parts to fill and the description of the files; torch's own would look for tensors to allocate."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return the pieces of this rank's boxes, by the boxes in the files."""
        assert self.metadata is not None, "torch gives the metadata before it asks for a plan"
        items: list[ReadItem] = []
        for key, part in cast(Parts, self.state_dict).items():
            if not part.boxes:
                continue  # nothing of it is held here, or it has no values at all and is in no file
            saved = self.metadata.state_dict_metadata[key]
            assert isinstance(saved, TensorStorageMetadata), f"{key} is no tensor: the comparison let it pass"
            found = create_read_items_for_chunk_list(key, saved, [chunk_of(box) for box in part.boxes])
            missing = sum(box.values.numel() for box in part.boxes) - sum(math.prod(item.lengths) for item in found)
            assert missing == 0, f"the files hold {missing} values too few of {key}"
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the values that a planned piece is to be read into."""
        return box_at(cast(Parts, self.state_dict), index).values


def write_items(key: str, part: Part) -> list[WriteItem]:
    """Return what is to be written of a tensor here."""
    return [
        WriteItem(
            index=MetadataIndex(key, torch.Size(box.offsets)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk_of(box), TensorProperties.create_from_tensor(box.values), torch.Size(part.shape)
            ),
        )
        for box in part.boxes
    ]


def chunk_of(box: Box) -> ChunkStorageMetadata:
    """Return a box as torch describes it."""
    return ChunkStorageMetadata(torch.Size(box.offsets), box.values.shape)


def box_at(parts: Parts, index: MetadataIndex) -> Box:
    """Return the box that torch means."""
    offsets = tuple(index.offset or ())
    return next(box for box in parts[index.fqn].boxes if box.offsets == offsets)
