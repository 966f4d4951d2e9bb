"""Initial values that do not depend on the layout: every rank draws the same numbers for the same expert."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moe_train.dist.parts import Box, Part
from moe_train.moe.roles import Kind, Role, roles_of


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, its name, the expert's global index) alone, and every buffer with zeros.

    Values are drawn in fp32 on the CPU and cast: draws of other dtypes or devices differ. Of a sharded parameter a rank
    draws the whole (one expert's at a time) and keeps what it holds: there is no drawing a part of a sequence.
    """
    for buffer in model.buffers():
        buffer.zero_()
    roles = roles_of(model)
    for name, parameter in model.named_parameters():
        role = roles[name]
        for box in Part.of(parameter).boxes:
            if role.std is None:
                box.values.fill_(1.0)
            elif role.kind is Kind.EXPERT:
                for place, values in enumerate(box.values, start=box.offsets[0]):
                    key = f"{seed}|{name}|{role.experts[place]}"
                    values.copy_(cut(draw(parameter.shape[1:], role, key), Box(values, box.offsets[1:])))
            else:
                box.values.copy_(cut(draw(parameter.shape, role, f"{seed}|{name}"), box))


def cut(whole: Tensor, box: Box) -> Tensor:
    """Return the values of a whole tensor at the place of a box."""
    return whole[tuple(slice(first, first + size) for first, size in zip(box.offsets, box.values.shape, strict=True))]


def draw(shape: torch.Size, role: Role, key: str) -> Tensor:
    """Return normal values with the role's mean and standard deviation, fp32, determined by ``key``."""
    assert role.std is not None, "ones are not drawn"
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(shape, dtype=torch.float32)
    if role.truncated:
        return nn.init.trunc_normal_(values, 0.0, role.std, -2 * role.std, 2 * role.std, generator=generator)
    return values.normal_(role.mean, role.std, generator=generator)
