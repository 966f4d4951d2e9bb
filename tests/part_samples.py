"""From tensors to parts and back, for tests that hold one box of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from moe_train.dist.parts import Part


def parts_of(
    tensors: Mapping[str, Tensor], expert_keys: Collection[str], experts: Sequence[int], num_experts: int
) -> dict[str, Part]:
    """Parts of what a rank holds, some of it of these experts."""
    return {
        key: Part.of_experts(tensor, experts, num_experts) if key in expert_keys else Part.whole(tensor)
        for key, tensor in tensors.items()
    }


def values_of(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The values of the one box of each part: the memory itself."""
    assert all(len(part.boxes) == 1 for part in parts.values()), "these parts are in pieces"
    return {key: part.boxes[0].values for key, part in parts.items()}
