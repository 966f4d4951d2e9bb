"""Graph-coupled models and what comes with them: no public class takes them, our own layout keeps all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_samples import config_of, model_of
from safetensors.torch import load_file

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.rules import train_problems
from moe_train.config.schema import ExportConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import ConfigError
from moe_train.interop.adopt import adopted
from moe_train.interop.card import architecture
from moe_train.interop.families import FAMILIES, expressed_by
from moe_train.interop.folder import PublicFolder
from moe_train.interop.native import NATIVE
from moe_train.interop.publish import Subject, preflight, publish
from moe_train.interop.start import load_first_weights, plan_start
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

VOCAB = Tokenizer.of_bytes().vocab_size
GRAPH = {"adjacency": "softmax", "pooling": "attention", "combiner": "gelu_norm", "adjacency_std": 2.0}
SMALL = {
    "dim": 16, "layers": 2, "heads": 2, "tie_embeddings": False, "head_bias": True, "norm": "layer",
    "positions": "learned", "max_positions": 12, "attention": {"kind": "gqa", "qkv_bias": True, "out_bias": True},
    "ffn": {"num_experts": 4, "expert_dim": 12, "expert_activation": "gelu", "expert_bias": True},
}  # fmt: skip
"""As the original, but for the sizes and the graph."""


def small(**graph: object) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | {"ffn": {**SMALL["ffn"], "graph": GRAPH | graph}})


MODELS = {
    "networks": small(),
    "blocks": small(expert="block"),
    "networks, dense layers between, looking ahead": ModelConfig.model_validate(
        {"dim": 16, "layers": 2, "heads": 2, "mtp": {"depth": 1},
         "ffn": {"num_experts": 3, "expert_dim": 8, "every": 2, "graph": {"max_neighbors": 1, "pooling": "weighted"}}}
    ),
    "blocks with latent attention": ModelConfig.model_validate(
        {"dim": 16, "layers": 1, "heads": 2,
         "attention": {"kind": "mla", "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "v_dim": 4},
         "ffn": {"num_experts": 2, "expert_dim": 8, "graph": {"expert": "block", "max_neighbors": 0}}}
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def built(config: ModelConfig, seed: int) -> Transformer:
    """A model whose every parameter and buffer is random, so that none may be lost or swapped."""
    model = build_model(config, VOCAB, LocalExchange(config.ffn.num_experts), "fp32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.4, generator=generator)
    return model.eval()


def exported(model: ModelConfig, to: Path, world: Any, mesh: Any) -> Transformer:
    """What was written, from a run folder that holds a tokenizer only."""
    to.parent.mkdir(exist_ok=True)
    tokenizer = Tokenizer.of_bytes()
    tokenizer.save(to.parent / "tokenizer.json")
    config = TrainConfig.model_validate({"model": model, "data": {"seq_len": 12}, "train": {"precision": "fp32"}})
    export = ExportConfig.model_validate({"run": {"dir": "run"}, "to": str(to)})
    choice = preflight(export, model)
    assert choice.family is NATIVE
    subject = Subject(config, tokenizer, built(model, seed=0), mesh, to.parent, 3)
    receipt = publish(export, choice, subject, world).receipt
    assert receipt is not None and "no class of transformers loads this layout" in str(receipt)
    return subject.model


def changed(model_type: str, **changes: Any) -> ModelConfig:
    """A family's sample with changes, by sections."""
    keys = model_of(config_of(model_type)).model_dump()
    for name, change in changes.items():
        keys[name] = {**keys[name], **change} if isinstance(change, dict) else change
    return ModelConfig.model_validate(keys)


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"ffn": {"graph": {}}}, "the experts are coupled by a graph"),
    ({"norm": "layer"}, "norm=layer, not rms"),
    ({"positions": "learned", "max_positions": 64}, "positions=learned, not rotary"),
    ({"head_bias": True, "tie_embeddings": False}, "the output head has a bias"),
]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("changes", "reason"), FOREIGN)
def test_no_public_class_takes_what_it_does_not_compute(model_type: str, changes: dict[str, Any], reason: str) -> None:
    """A folder without it would load and compute something else."""
    assert FAMILIES[model_type].refusals(changed(model_type, **changes)) == [reason]


@pytest.mark.parametrize("preset", ["graph_tiny", "graph_block_tiny", "graph_original"])
def test_every_class_says_why_it_is_not_a_preset(preset: str) -> None:
    model = compose_config("train", TrainConfig, lambda config: [], [f"model={preset}"]).model
    reasons = expressed_by(model)
    assert isinstance(reasons, list)
    assert {reason.partition(":")[0] for reason in reasons if "coupled by a graph" in reason} == set(FAMILIES)
    export = ExportConfig.model_validate({"run": {"dir": "run"}, "to": "nowhere", "format": "huggingface"})
    with pytest.raises(ConfigError, match=r"the experts are coupled by a graph.*format=moe_train"):
        preflight(export, model)


@every_model
def test_our_own_layout_keeps_every_tensor_and_the_same_logits(
    model: ModelConfig, tmp_path: Path, world: Any, mesh: Any
) -> None:
    written = exported(model, tmp_path / "run" / "to", world, mesh)
    again = built(model.model_copy(update={"init_from": str(tmp_path / "run" / "to")}), seed=1)
    load_first_weights(again, world, seed=0)
    found = again.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(found[name], tensor), name
    tokens_BS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(tokens_BS).logits_BSV, written(tokens_BS).logits_BSV)


@pytest.mark.parametrize("expert", ["ffn", "block"])
def test_an_expert_has_tensors_of_its_own(expert: str, tmp_path: Path, world: Any, mesh: Any) -> None:
    model = small(expert=expert)
    written = exported(model, tmp_path / "run" / "to", world, mesh).state_dict()
    files = load_file(tmp_path / "run" / "to" / "model.safetensors")
    stacked = [name for name in written if ".experts." in name]
    assert len(stacked) >= 2 * 4
    for name in stacked:
        assert name not in files
        for e in range(4):
            assert torch.equal(files[f"{name}.{e}"], written[name][e]), name
    assert files["positions_SD"].shape == (12, 16) and files["head.bias"].shape == (VOCAB,)
    assert any(name.endswith("logits_EE") for name in files)


@every_model
def test_config_json_says_the_whole_model(model: ModelConfig, tmp_path: Path, world: Any, mesh: Any) -> None:
    exported(model, tmp_path / "run" / "to", world, mesh)
    public = json.loads((tmp_path / "run" / "to" / "config.json").read_text())
    found = NATIVE.architecture(public)
    assert found.problems == []
    again = ModelConfig.model_validate(found.model)
    assert again.model_copy(update={"vocab_size": None}) == model
    assert set(public["model"]["ffn"]["graph"]) == set(type(model.ffn.graph).model_fields)


def composed(*overrides: str) -> TrainConfig:
    return compose_config("train", TrainConfig, train_problems, list(overrides), prepare=adopted)


def test_a_run_takes_the_architecture_of_a_folder(tmp_path: Path, world: Any, mesh: Any) -> None:
    to, own = tmp_path / "run" / "to", small(expert="block")
    exported(own, to, world, mesh)
    stated = ["model=pretrained", f"model.init_from={to}", f"run.dir={tmp_path}/new", "tokenizer=file"]
    stated += [f"tokenizer.path={to}/tokenizer.json", "data.seq_len=12"]
    found = composed(*stated).model
    free = {"init_from": None, "adopt": False, "vocab_size": None}
    assert found.adopt and found.vocab_size == VOCAB
    assert found.model_copy(update=free) == own
    changed = composed(*stated, "model.ffn.graph.recompute=true", "model.ffn.graph.orthogonality=0.5").model.ffn.graph
    assert changed == own.ffn.graph.model_copy(update={"recompute": True, "orthogonality": 0.5})
    with pytest.raises(ConfigError, match=r"max_positions=12: is shorter than data\.seq_len=13"):
        composed(*stated, "data.seq_len=13")


def folder_of(model: ModelConfig) -> PublicFolder:
    """A folder of which only config.json is looked at."""
    return PublicFolder(Path("folder"), NATIVE.public_config(model, VOCAB), None, {})  # type: ignore[arg-type]


def stated(model: ModelConfig, **graph: object) -> ModelConfig:
    """The model as it is configured for a start, with other keys of its graph."""
    changed = model.ffn.graph and model.ffn.graph.model_copy(update=graph)
    ffn = model.ffn.model_copy(update={"graph": changed})
    return model.model_copy(update={"ffn": ffn, "vocab_size": VOCAB, "init_from": "folder"})


def keys_refused(model: ModelConfig, folder: PublicFolder) -> set[str]:
    with pytest.raises(ConfigError) as caught:
        plan_start(model, VOCAB, folder)
    return {problem.key for problem in caught.value.problems}


def test_keys_of_the_training_are_the_users() -> None:
    free = {"recompute": True, "chunk_tokens": 4, "orthogonality": 0.1, "adjacency_std": 0.5, "adjacency_mean": -1.0}
    assert plan_start(stated(small(), **free), VOCAB, folder_of(small())).segments is None


def test_keys_of_the_function_must_be_the_folders() -> None:
    other = {"layers": 1, "adjacency": "sigmoid", "similarity": "dot", "normalize": "count", "self_edges": True}
    other |= {"max_neighbors": 1, "pooling": "mean", "combiner": "none", "expert": "block"}
    assert keys_refused(stated(small(), **other), folder_of(small())) == {f"model.ffn.graph.{key}" for key in other}
    longer = stated(small()).model_copy(update={"max_positions": 13, "norm": "rms"})
    assert keys_refused(longer, folder_of(small())) == {"model.max_positions", "model.norm"}


def test_a_model_without_a_graph_does_not_start_from_one_that_has_it() -> None:
    routed = ModelConfig.model_validate(SMALL | {"vocab_size": VOCAB, "init_from": "folder"})
    keys = keys_refused(routed, folder_of(small()))
    assert {"model.ffn.graph.layers", "model.ffn.graph.expert"} <= keys
    keys = keys_refused(stated(small()), folder_of(routed))
    assert {"model.ffn.graph.layers", "model.ffn.graph.expert"} <= keys


@pytest.mark.parametrize("expert", ["ffn", "block"])
@pytest.mark.parametrize("same_width", [False, True])
def test_a_dense_model_is_not_made_into_experts_that_are_coupled(expert: str, same_width: bool) -> None:
    """Whatever else differs: that is the reason, and there is one."""
    public = FAMILIES["llama"].public_config(changed("llama"), VOCAB) | {"model_type": "llama"}
    folder = PublicFolder(Path("folder"), public, None, {})  # type: ignore[arg-type]
    dense = changed("llama")
    ffn = {"num_experts": 4, "expert_dim": dense.ffn.hidden_dim if same_width else 7, "graph": {"expert": expert}}
    model = dense.model_copy(update={"ffn": type(dense.ffn)(**ffn), "init_from": "folder", "vocab_size": VOCAB})
    with pytest.raises(ConfigError) as caught:
        plan_start(model, VOCAB, folder)
    (problem,) = caught.value.problems
    assert problem.key == "model.init_from" and "coupled by a graph" in problem.rule


def test_the_card_says_what_the_experts_are() -> None:
    networks = "4 experts (feed-forward networks) that all see every token, 2 graph layers"
    assert architecture(small()) == f"2 layers of width 16, 2 heads (gqa), {networks}"
    assert "4 experts (whole blocks) that all see every token, 3 graph layers" in architecture(
        small(expert="block", layers=3)
    )
