"""Looks into checkpoints, merges them into safetensors files, and compares two of them; needs no run and no ranks.

Usage:
    python scripts/checkpoint.py inspect RUN_OR_CHECKPOINT [--tensors]
    python scripts/checkpoint.py merge CHECKPOINT OUTPUT.safetensors [--optimizer]
    python scripts/checkpoint.py merge CHECKPOINT OUTPUT_FOLDER --file-gib 4 [--optimizer]
    python scripts/checkpoint.py diff A B [--weights]

Where a run is given, its newest checkpoint is meant (inspect: all of them). Exit status: 0; 1 when inspect found damage
or diff found a difference; 2 when it could not be done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from moe_train.checkpoint.merge import merge
from moe_train.checkpoint.whole import (
    Stored,
    TensorInfo,
    checkpoints_at,
    differences_of,
    intact,
    look_at,
)
from moe_train.errors import UserError

CANNOT = 2
FOUND = 1
MIB, GIB = 1 << 20, 1 << 30


def table(rows: Iterable[Sequence[object]]) -> str:
    """Return lines whose columns stand below each other; numbers to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    numbers = [[isinstance(cell, int) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row, kinds in zip(cells, numbers, strict=True):
        padded = [
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, kinds, strict=True)
        ]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def described(stored: Stored, with_tensors: bool) -> str:
    """Return what a checkpoint holds."""
    lines = [f"{stored.path}: {'intact' if not stored.damages else 'DAMAGED'}"]
    lines += [f"  {damage}" for damage in stored.damages]
    if stored.manifest is None:
        return "\n".join(lines)
    written_by = {"world_size": stored.manifest.world_size, "ep": stored.manifest.ep}
    written_by |= stored.trainer.get("layout", {})
    lines.append(f"step {stored.manifest.step}, written by " + ", ".join(f"{k} {v}" for k, v in written_by.items()))
    told = {key: value for key, value in stored.trainer.items() if key not in ("layout", "step")}
    lines.append("trainer:\n" + table([(key, json.dumps(value)) for key, value in told.items()]) if told else "")
    lines.append("files:\n" + files_of(stored))
    if stored.tensors:
        lines.append("tensors, values and bytes:\n" + groups_of(stored.tensors))
    if stored.tensors and with_tensors:
        rows = [(t.key, str(t.shape), str(t.dtype).removeprefix("torch."), t.size_bytes) for t in stored.tensors]
        lines.append("every tensor:\n" + table(rows))
    return "\n".join(line for line in lines if line)


def files_of(stored: Stored) -> str:
    """Return a table of the files of a checkpoint with a readable manifest."""
    assert stored.manifest is not None
    damaged = {Path(problem.key).name for problem in stored.damages}
    files = sorted(stored.manifest.files.items())
    return table([(name, file.size_bytes, "damaged" if name in damaged else "verified") for name, file in files])


def groups_of(tensors: Sequence[TensorInfo]) -> str:
    """Return a table of the tensors by section and layer."""
    groups: dict[tuple[str, str], list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.section, tensor.layer].append(tensor)
        groups[tensor.section, "(all)"].append(tensor)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], natural(item[0][1])))
    return table(
        [
            (*key, len(some), sum(t.num_values for t in some), sum(t.size_bytes for t in some), formats_of(some))
            for key, some in ordered
        ]
    )


def natural(layer: str) -> tuple[str, int]:
    """Return what sorts layer 10 after layer 9."""
    name, _, number = layer.rpartition(".")
    return (name, int(number)) if name and number.isdigit() else (layer, -1)


def formats_of(tensors: Sequence[TensorInfo]) -> str:
    """Return the number formats of some tensors."""
    return " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def inspect(arguments: argparse.Namespace) -> int:
    """Print what a checkpoint, or each of a run, holds."""
    found = [look_at(folder) for folder in checkpoints_at(arguments.path)]
    print("\n\n".join(described(stored, arguments.tensors) for stored in found))
    return FOUND if any(stored.damages for stored in found) else 0


def run_merge(arguments: argparse.Namespace) -> int:
    """Write the whole tensors of a checkpoint into safetensors files."""
    stored = intact(checkpoints_at(arguments.checkpoint)[-1])
    file_bytes = None if arguments.file_gib is None else int(arguments.file_gib * GIB)
    for path in merge(stored, arguments.output, arguments.optimizer, file_bytes):
        print(f"{path}: {path.stat().st_size / MIB:,.1f} MiB")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Print the tensors in which two checkpoints differ."""
    a, b = (intact(checkpoints_at(path)[-1]) for path in (arguments.a, arguments.b))
    if arguments.weights:
        a, b = without_optimizer(a), without_optimizer(b)
    print(f"a: {a.path}\nb: {b.path}")
    count = 0
    for difference in differences_of(a, b):
        print(f"  {difference.key} {difference.rule}")
        count += 1
    keys = {tensor.key for stored in (a, b) for tensor in stored.tensors}
    print(f"{count} of {len(keys)} tensors differ" if count else f"all {len(keys)} tensors are equal")
    return FOUND if count else 0


def without_optimizer(stored: Stored) -> Stored:
    """Return a checkpoint of the weights alone."""
    assert stored.metadata is not None, "it is intact"
    entries = stored.metadata.state_dict_metadata
    weights = {key: entry for key, entry in entries.items() if key.startswith("model.")}
    return replace(stored, metadata=replace(stored.metadata, state_dict_metadata=weights))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description="Look into checkpoints, merge them, compare them.")
    commands = made.add_subparsers(required=True)
    one = commands.add_parser("inspect", help="what a checkpoint, or each of a run, holds, and whether it is intact")
    one.add_argument("path", type=Path, help="run folder or checkpoint")
    one.add_argument("--tensors", action="store_true", help="list every tensor")
    one.set_defaults(work=inspect)
    one = commands.add_parser("merge", help="write whole tensors into safetensors files")
    one.add_argument("checkpoint", type=Path, help="checkpoint, or run folder for its newest")
    one.add_argument("output", type=Path, help="file; with --file-gib a folder")
    one.add_argument("--optimizer", action="store_true", help="with the optimizer's state")
    one.add_argument("--file-gib", type=float, help="largest file, in GiB; without it everything goes into one")
    one.set_defaults(work=run_merge)
    one = commands.add_parser("diff", help="in what two checkpoints differ")
    one.add_argument("a", type=Path)
    one.add_argument("b", type=Path)
    one.add_argument("--weights", action="store_true", help="without the optimizer's state")
    one.set_defaults(work=diff)
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = parser().parse_args(words)
    try:
        return int(arguments.work(arguments))
    except UserError as error:
        print(error.report(), file=sys.stderr)
    except OSError as error:
        print(f"cannot: {error}", file=sys.stderr)
    return CANNOT


if __name__ == "__main__":
    sys.exit(main())
