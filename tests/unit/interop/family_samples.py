"""Tiny public models, and the obvious loops that read and write them by a family's table.

The loops know nothing of files, shards and ranks: they are what the streaming readers and writers are measured by.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.config.rules import model_problems
from moe_train.interop.families import FAMILIES, Family
from moe_train.interop.parts import Part, Parts
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 61
TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 20}
MLA = {"kv_lora_rank": 14, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
       "num_key_value_heads": 4}  # fmt: skip
DEEPSEEK = MLA | {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
                  "intermediate_size": 20, "n_shared_experts": 2, "first_k_dense_replace": 1}  # fmt: skip
BASE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 20, "num_key_value_heads": 2},
    "mixtral": {"intermediate_size": 12, "num_key_value_heads": 2, "num_local_experts": 5},
    "qwen2_moe": EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 18},
    "qwen3_moe": EXPERTS | {"num_key_value_heads": 2},
    "olmoe": {"intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "gpt_oss": {"intermediate_size": 12, "num_local_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2,
                "head_dim": 8, "sliding_window": 5},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
}  # fmt: skip
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""transformers' slow and obvious code paths."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json with changes."""
    return {"model_type": model_type, **TINY, **BASE[model_type], **changes}


def class_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of a config.json; it changes what it is given, so it gets a copy."""
    keys = {key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **keys)


def random_public(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A transformers model in which nothing is zero, one or symmetric."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(class_config(config), **PLAIN)
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw all parameters, and the buffers that are saved."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("bias", "sinks", "_bias")):
            tensor.normal_(0.0, 0.3)
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0.0, 0.2)


@dataclass(frozen=True)
class Folder:
    """What lies on disk."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def saved(model: PreTrainedModel, path: Path) -> Folder:
    """What transformers writes."""
    model.save_pretrained(path)
    return read(path)


def read(path: Path) -> Folder:
    return Folder(json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors"))


def model_of(config: Mapping[str, Any], names: Any = ()) -> ModelConfig:
    """Our model section, as deep as the folder's tensors go."""
    family = FAMILIES[config["model_type"]]
    architecture = family.architecture(config)
    assert architecture.problems == []
    model = ModelConfig.model_validate(architecture.model)
    assert [str(problem) for problem in model_problems(model)] == []
    depth = family.depth_present(model, names)
    return model.model_copy(update={"mtp": model.mtp.model_copy(update={"depth": depth})})


def build(model: ModelConfig, vocab_size: int = VOCAB) -> Transformer:
    """Our model, filled with what must not survive."""
    built = build_model(model, vocab_size, LocalExchange(model.ffn.num_experts), "fp32", torch.device("cpu"))
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.fill_(float("nan"))
    return built.eval()


def turn(part: Part, piece: Tensor) -> Tensor:
    piece = piece if part.rows is None else piece[part.rows]
    return piece.transpose(-1, -2) if part.transposed else piece


def turn_back(part: Part, piece: Tensor) -> Tensor:
    piece = piece.transpose(-1, -2) if part.transposed else piece
    if part.rows is None:
        return piece
    back = torch.empty_like(piece)
    back[part.rows] = piece
    return back


def fill(ours: Mapping[str, Tensor], parts: Parts, theirs: Mapping[str, Tensor]) -> None:
    """Import."""
    with torch.no_grad():
        for name, pieces in parts.items():
            for part in pieces:
                if not part.copy:
                    assert theirs[part.name].shape == part.shape, part.name
                    ours[name][part.ours] = part.factor * turn(part, theirs[part.name][part.theirs])


def emptied(ours: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Export."""
    theirs: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        for part in pieces:
            tensor = theirs.setdefault(part.name, torch.full(part.shape, float("nan"), dtype=ours[name].dtype))
            tensor[part.theirs] = turn_back(part, ours[name][part.ours]) / part.factor
    return theirs


def imported(folder: Folder) -> Transformer:
    """Our model with a folder's weights."""
    model = model_of(folder.config, folder.tensors)
    built = build(model, folder.config["vocab_size"])
    family = FAMILIES[folder.config["model_type"]]
    fill(built.state_dict(), family.parts(model, folder.config["vocab_size"]), folder.tensors)
    assert not any(tensor.isnan().any() for tensor in built.state_dict().values())
    return built


def exported(built: Transformer, family: Family, path: Path) -> PreTrainedModel:
    """Our model as transformers loads it from a folder; nothing may be missing or left over."""
    vocab_size = built.embedding_VD.shape[0]
    tensors = emptied({name: tensor.detach() for name, tensor in built.state_dict().items()},
                      family.parts(built.config, vocab_size))  # fmt: skip
    for name, (shape, value) in family.constants(built.config).items():
        tensors[name] = torch.full(shape, value)
    path.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = family.public_config(built.config, vocab_size) | {"max_position_embeddings": 64}
    (path / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForCausalLM.from_pretrained(path, **PLAIN, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def random_tokens(batch: int = 2, length: int = 19, seed: int = 5) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, theirs: Tensor, scale: float | None = None) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / (scale or theirs.abs().max())).item()
