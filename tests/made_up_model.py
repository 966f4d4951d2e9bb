"""A small model that no class has, with every kind of part, and the folder that it should become: by plain loops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_train.interop.load import Expected
from moe_train.interop.parts import Part
from moe_train.interop.pieces import Held

D, F, E = 6, 5, 4
ROWS = torch.tensor([0, 2, 4, 1, 3, 5])
SHARDED = frozenset({"gate_up", "down", "packed"})


def whole(seed: int = 0) -> dict[str, Tensor]:
    """Our tensors over all ranks."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding": (7, D), "qkv": (3 * D, D), "turned": (D, 3), "norm": (D,), "router.bias_E": (E,),
        "gate_up": (E, D, 2 * F), "down": (E, F, D), "packed": (E, D, 2 * F),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def expected() -> Expected:
    """The table."""
    parts: dict[str, list[Part]] = {
        "embedding": [Part("embed.weight", (7, D)), Part("mtp.embed.weight", (7, D), copy=True)],
        "qkv": [Part(f"{n}_proj.weight", (D, D), ours=(slice(i * D, (i + 1) * D),)) for i, n in enumerate("qkv")],
        "turned": [Part("turned.weight", (D, 3), rows=ROWS)],
        "norm": [Part("norm.weight", (D,))],
        "router.bias_E": [Part("gate.e_score_correction_bias", (E,))],
        "gate_up": [],
        "down": [],
        "packed": [],
    }
    for e in range(E):
        for half, name in enumerate(("w1", "w3")):
            place = (e, slice(None), slice(half * F, (half + 1) * F))
            parts["gate_up"].append(Part(f"experts.{e}.{name}.weight", (F, D), ours=place, transposed=True))
            theirs = (e, slice(None), slice(half, None, 2))
            parts["packed"].append(Part("packed", (E, D, 2 * F), ours=place, theirs=theirs))
        parts["down"].append(Part(f"experts.{e}.w2.weight", (D, F), ours=(e,), transposed=True, factor=0.5))
    return Expected(parts, {"zeros.bias": ((D,), 0.0)}, layers=2)


def public_tensors(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public tensors of `whole`, by plain indexing."""
    turned = torch.empty(D, 3)
    for i, row in enumerate(ROWS.tolist()):
        turned[row] = ours["turned"][i]
    found = {
        "embed.weight": ours["embedding"],
        "mtp.embed.weight": ours["embedding"].clone(),
        "turned.weight": turned,
        "q_proj.weight": ours["qkv"][:D],
        "k_proj.weight": ours["qkv"][D : 2 * D],
        "v_proj.weight": ours["qkv"][2 * D :],
        "norm.weight": ours["norm"],
        "gate.e_score_correction_bias": ours["router.bias_E"],
        "zeros.bias": torch.zeros(D),
        "packed": torch.empty(E, D, 2 * F),
    }
    for e in range(E):
        found[f"experts.{e}.w1.weight"] = ours["gate_up"][e, :, :F].T
        found[f"experts.{e}.w3.weight"] = ours["gate_up"][e, :, F:].T
        found[f"experts.{e}.w2.weight"] = ours["down"][e].T / 0.5
        for column in range(F):
            found["packed"][e, :, 2 * column] = ours["packed"][e, :, column]
            found["packed"][e, :, 2 * column + 1] = ours["packed"][e, :, F + column]
    return found


def held(ours: Mapping[str, Tensor], experts: range = range(E)) -> Held:
    """What a rank with these experts has, in memory of its own."""
    cut = {n: (t[experts.start : experts.stop] if n in SHARDED else t).clone() for n, t in ours.items()}
    return Held(cut, SHARDED, experts)


def folder_of(path: Path, tensors: Mapping[str, Tensor], files: int = 1, config: dict[str, Any] | None = None) -> Path:
    """Write a folder as the library does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "made_up", **(config or {})}))
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if files == 1:
        save_file(plain, path / "model.safetensors", metadata={"format": "pt"})
        return path
    where = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(plain)}
    for file in sorted(set(where.values())):
        save_file({name: plain[name] for name in plain if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path
