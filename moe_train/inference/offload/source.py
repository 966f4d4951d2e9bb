"""Single experts out of a checkpoint, of any layout, without reading others and without the other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.planner import PartReader
from moe_train.checkpoint.reader import Checkpoint
from moe_train.checkpoint.stored import BoxReader
from moe_train.dist.parts import Box, Part
from moe_train.inference.offload.record import Form


class Source:
    """A checkpoint whose files are verified.

    Args:
        checkpoint: that was opened.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.metadata = read_metadata(checkpoint.path, checkpoint.manifest)
        self.boxes = BoxReader(checkpoint.path, self.metadata)

    def read(self, form: Form, name: str, *, expert: int) -> Tensor:
        """Return one tensor of one expert, on the CPU in the form's dtype.

        Where the checkpoint's own dtype is wider, the rows that are read exist beside it for a moment.

        Args:
            form: of the layer.
            name: of the tensor.
            expert: global index.
        """
        values = torch.empty(dict(form.tensors)[name], dtype=form.dtype)
        box = Box(values.unsqueeze(0), (expert, *([0] * values.dim())))
        part = Part((form.num_experts, *values.shape), (box,))
        planner = PartReader()
        planner.set_up_planner({f"model.{form.layer}.{name}": part}, self.metadata)
        self.boxes.read(planner.create_local_plan().items, planner)
        return values
