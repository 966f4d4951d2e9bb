"""Published weights in 8 and 4 bits, as plain tensors.

DeepSeek-V3 (arXiv 2412.19437, section 3.3): e4m3 values with one fp32 scale per block of 128 x 128. gpt-oss: MXFP4 of
the OCP Microscaling specification 1.0, 32 e2m1 values with one e8m0 scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_train.errors import Problem
from moe_train.interop.shards import Entry, Shards

FP8_SCALE = "_scale_inv"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
MXFP4_BLOCK = 32
"""Values that share a scale; two to a byte, the earlier one in the low half."""
E8M0_BIAS = 127
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the low three bits; the fourth is the sign."""
PLAIN_FORMATS = ("F32", "BF16", "F16", "F64", "I64", "BOOL")
"""Of weights, and of buffers that nobody reads."""
READABLE_METHODS = ("fp8", "mxfp4")
UNQUANTISED = "use the folder with plain weights"


class Stored(Protocol):
    """A tensor as the rest of the program sees it, however it is stored.

    Attributes:
        shape: when read.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain tensor."""
        ...

    def read(self, shards: Shards, index: int | slice) -> Tensor:
        """Return ``plain[index]``, reading no more than that."""
        ...


@dataclass(frozen=True)
class Plain:
    """A tensor stored as it is."""

    name: str
    shape: tuple[int, ...]

    def read(self, shards: Shards, index: int | slice) -> Tensor:
        """Return ``plain[index]`` in the stored dtype."""
        return shards.read(self.name, index)


@dataclass(frozen=True)
class Fp8:
    """A matrix of e4m3 values, multiplied by one scale per block.

    Attributes:
        name: of the values; the scales have ``_scale_inv`` behind it.
        shape: [rows, columns].
        block: (rows, columns) of a block; those at the lower and right edge may be smaller.
    """

    name: str
    shape: tuple[int, ...]
    block: tuple[int, int]

    def read(self, shards: Shards, index: int | slice) -> Tensor:
        """Return fp32 ``plain[index]``."""
        rows = range(self.shape[0])[index if isinstance(index, slice) else slice(index, index + 1)]
        assert rows.step == 1, "rows of a quantised matrix are read in order"
        first, last = rows.start // self.block[0], -(-rows.stop // self.block[0])
        scale_NM = shards.read(self.name + FP8_SCALE, slice(first, last)).float()
        plain = dequantise_fp8(shards.read(self.name, slice(rows.start, rows.stop)), scale_NM, self.block, rows.start)
        return plain if isinstance(index, slice) else plain[0]


@dataclass(frozen=True)
class Mxfp4:
    """The matrices of all experts as e2m1 values with scales, stored transposed.

    Attributes:
        name: of the plain tensor; values and scales have ``_blocks`` and ``_scales`` behind it.
        shape: [experts, columns, rows], of values [experts, rows, columns / 32, 16].
    """

    name: str
    shape: tuple[int, ...]

    def read(self, shards: Shards, index: int | slice) -> Tensor:
        """Return fp32 ``plain[index]``."""
        blocks, scales = (shards.read(self.name + end, index) for end in (MXFP4_BLOCKS, MXFP4_SCALES))
        return dequantise_mxfp4(blocks, scales).transpose(-1, -2)


def dequantise_fp8(values_NM: Tensor, scale_NM: Tensor, block: tuple[int, int], first_row: int = 0) -> Tensor:
    """Return fp32 values times the scale of their block.

    Args:
        values_NM: [rows, columns] e4m3.
        scale_NM: [blocks that hold these rows, blocks of columns] fp32.
        block: (rows, columns) of a block.
        first_row: number of the first row in the whole matrix: it may lie inside a block.
    """
    rows, columns = values_NM.shape
    plain_NM = values_NM.float()
    block_of_row = (torch.arange(rows) + first_row % block[0]) // block[0]
    # Block by block of columns: scales as large as the matrix would double the memory.
    for number, start in enumerate(range(0, columns, block[1])):
        plain_NM[:, start : start + block[1]] *= scale_NM[block_of_row, number, None]
    return plain_NM


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 [..., 32 · G] of MXFP4 values.

    Args:
        blocks: [..., G, 16] uint8, two values to a byte.
        scales: [..., G] uint8, exponents of two with bias 127.
    """
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    both = torch.stack([table[(blocks & 0x0F).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    return torch.ldexp(both, scales.int().unsqueeze(-1) - E8M0_BIAS).flatten(-2)


def resolve(
    entries: Mapping[str, Entry], config: Mapping[str, Any], key: str
) -> tuple[dict[str, Stored], list[Problem]]:
    """Return the tensors of a folder as they will be read, and what cannot be read.

    Args:
        entries: what the files hold.
        config: config.json; ``quantization_config`` in it says how weights are stored.
        key: what to call the folder in messages.
    """
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method is not None and method not in READABLE_METHODS:
        rule = f"its weights are quantised as {method}, and only {' and '.join(READABLE_METHODS)} are read"
        return {}, [Problem(key, None, rule, UNQUANTISED)]
    stored: dict[str, Stored] = {}
    problems = []
    for name, entry in entries.items():
        if _is_scale(name, entries):
            continue
        found = _stored(name, entry, entries, settings)
        if isinstance(found, str):
            problems.append(Problem(key, None, f"{name} {found}", UNQUANTISED))
        else:
            stored[name.removesuffix(MXFP4_BLOCKS) if isinstance(found, Mxfp4) else name] = found
    return stored, problems


def _is_scale(name: str, entries: Mapping[str, Entry]) -> bool:
    """Whether a tensor only serves another one."""
    if name.endswith(MXFP4_SCALES):
        return name.removesuffix(MXFP4_SCALES) + MXFP4_BLOCKS in entries
    return name.endswith(FP8_SCALE) and name.removesuffix(FP8_SCALE) in entries


def _stored(name: str, entry: Entry, entries: Mapping[str, Entry], settings: Mapping[str, Any]) -> Stored | str:
    """Return how a tensor is read, or why it is not."""
    if name.endswith(MXFP4_BLOCKS) and entry.dtype == "U8":
        scales = entries.get(name.removesuffix(MXFP4_BLOCKS) + MXFP4_SCALES)
        if len(entry.shape) != 4 or entry.shape[-1] * 2 != MXFP4_BLOCK:
            return f"has shape {list(entry.shape)}, not [experts, rows, columns/32, 16]"
        if scales is None or scales.shape != entry.shape[:-1]:
            return f"has no scales of shape {list(entry.shape[:-1])} beside it"
        experts, rows, groups, _ = entry.shape
        return Mxfp4(name.removesuffix(MXFP4_BLOCKS), (experts, groups * MXFP4_BLOCK, rows))
    if entry.dtype == "F8_E4M3":
        rows, columns = settings.get("weight_block_size") or (128, 128)
        scales = entries.get(name + FP8_SCALE)
        wanted = tuple(-(-size // block) for size, block in zip(entry.shape, (rows, columns), strict=False))
        if len(entry.shape) != 2 or scales is None or scales.shape != wanted:
            return f"is in e4m3 without scales {name}{FP8_SCALE} for blocks of {rows} x {columns}"
        return Fp8(name, entry.shape, (rows, columns))
    if entry.dtype not in PLAIN_FORMATS:
        return f"is in the number format {entry.dtype}, which is no weight that can be read"
    return Plain(name, entry.shape)
