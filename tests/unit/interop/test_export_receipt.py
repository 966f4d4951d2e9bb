"""A whole export in one process: what the proof finds, what it says when it cannot be given, and our own layout."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from moe_train.config.schema import ExportConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import CheckpointError, ConfigError
from moe_train.interop import save
from moe_train.interop.families import FAMILIES
from moe_train.interop.folder import PublicFolder
from moe_train.interop.load import expected_of, fill
from moe_train.interop.native import NATIVE, family_in
from moe_train.interop.pieces import held_of
from moe_train.interop.publish import Choice, Subject, preflight, publish
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange

FFN = {"num_experts": 4, "top_k": 2, "expert_dim": 24, "router": {"kind": "topk", "normalize": "selected"}}
MODEL = {"dim": 32, "layers": 2, "heads": 4, "attention": {"kind": "gqa", "kv_heads": 2}, "ffn": FFN}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Tokenizer.of_bytes().save(folder / "tokenizer.json")
    return folder


def subject_of(run_dir, mesh, precision="fp32", model=None) -> Subject:
    content = {"model": model or MODEL, "data": {"seq_len": 48}, "train": {"precision": precision}}
    config = TrainConfig.model_validate(content)
    tokenizer = Tokenizer.of_bytes()
    exchange = LocalExchange(config.model.ffn.num_experts)
    built = build_model(config.model, tokenizer.vocab_size, exchange, precision, torch.device("cpu"))
    initialise(built, seed=0)
    with torch.no_grad():  # weights large enough for the choice of experts and the positions to matter
        for parameter in built.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return Subject(config, tokenizer, built.eval(), mesh, run_dir, 7)


def config_of(to: Path, **settings) -> ExportConfig:
    return ExportConfig.model_validate({"run": {"dir": "run"}, "to": str(to), **settings})


@dataclass(frozen=True)
class Mistaken:
    """Mixtral with a mistake in its table: what is written reads back, and is another model."""

    class_name = "MixtralForCausalLM"
    model_type = "mixtral"
    mistake: str

    def __getattr__(self, name):
        return getattr(FAMILIES["mixtral"], name)

    def parts(self, model, vocab_size):
        table = dict(FAMILIES["mixtral"].parts(model, vocab_size))
        for name, pieces in table.items():
            if self.mistake == "gate and up swapped" and "gate_up" in name:
                swap = {"w1": "w3", "w3": "w1"}
                names = [".".join(swap.get(word, word) for word in part.name.split(".")) for part in pieces]
                table[name] = [replace(part, name=new) for part, new in zip(pieces, names, strict=True)]
            if self.mistake == "heads in another order" and "qkv" in name:
                order = torch.arange(32).view(4, 8).flip(0).flatten()
                table[name] = [replace(p, rows=order) if "q_proj" in p.name else p for p in pieces]
            if self.mistake == "scale" and "down_LFD" in name:
                table[name] = [replace(part, factor=1.001) for part in pieces]
        return table


@pytest.mark.parametrize("precision, dtype", [("fp32", None), ("bf16", None), ("fp64", None), ("fp32", "bf16")])
def test_the_folder_computes_what_the_run_computes(tmp_path, run_dir, world, mesh, precision, dtype):
    subject = subject_of(run_dir, mesh, precision)
    config = config_of(tmp_path / "to", dtype=dtype)
    exported = publish(config, preflight(config, subject.config.model), subject, world)
    assert exported.receipt.difference < 1e-5
    stored = {tensor.dtype for tensor in load_file(tmp_path / "to" / "model.safetensors").values()}
    assert stored == {torch.bfloat16 if "bf16" in (precision, dtype) else torch.float32}


@pytest.mark.parametrize("mistake", ["gate and up swapped", "heads in another order", "scale"])
def test_a_mistake_in_a_table_is_found_and_nothing_stays(tmp_path, run_dir, world, mesh, mistake):
    subject = subject_of(run_dir, mesh)
    with pytest.raises(CheckpointError, match="logits in transformers differ from the run's by"):
        publish(config_of(tmp_path / "to"), Choice(Mistaken(mistake)), subject, world)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_written_wrongly_is_found_without_transformers(tmp_path, run_dir, world, mesh, monkeypatch):
    def flipped(file, tensor, plain=save._append):
        plain(file, tensor * 1.001 if tensor.shape == (32, 24) else tensor)

    monkeypatch.setattr(save, "_append", flipped)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"down_LFD is not in the files as it is in the model"):
        config = config_of(tmp_path / "to")
        publish(config, Choice(FAMILIES["mixtral"]), subject_of(run_dir, mesh), world)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_compared_is_said(tmp_path, run_dir, world, mesh, monkeypatch):
    subject = subject_of(run_dir, mesh)
    mixtral = Choice(FAMILIES["mixtral"])
    assert publish(config_of(tmp_path / "a", verify=False), mixtral, subject, world).receipt is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    told = str(publish(config_of(tmp_path / "b"), mixtral, subject, world).receipt)
    assert "logits were not compared: that takes" in told and "were read back" in told
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = str(publish(config_of(tmp_path / "c"), mixtral, subject, world).receipt)
    assert "logits were not compared: transformers is not installed" in told


def test_our_own_layout_comes_back(tmp_path, run_dir, world, mesh):
    hashed = {**MODEL, "ffn": {**FFN, "router": {"kind": "hash"}}, "mtp": {"depth": 1}}
    subject = subject_of(run_dir, mesh, model=hashed)
    config = config_of(tmp_path / "to")
    choice = preflight(config, subject.config.model)
    assert choice.family is NATIVE and any(line.startswith("mixtral: ") for line in choice.reasons)
    publish(config, choice, subject, world)
    folder = PublicFolder.open(tmp_path / "to")
    family = family_in(folder.config, folder.path)
    assert family is NATIVE
    architecture = family.architecture(folder.config)
    section = type(subject.config.model).model_validate(architecture.model)
    assert section.model_copy(update={"vocab_size": None}) == subject.config.model and section.vocab_size == 257
    again = subject_of(run_dir, mesh, model=hashed).model
    for parameter in again.parameters():
        parameter.data.fill_(torch.nan)
    fill(held_of(again), expected_of(family, section, 257), folder, world)
    for name, tensor in subject.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_model_that_no_class_expresses_is_refused_with_every_reason(tmp_path):
    model = TrainConfig.model_validate({"model": {**MODEL, "ffn": {**FFN, "router": {"kind": "hash"}}}}).model
    (tmp_path / "to").write_text("taken")
    with pytest.raises(ConfigError) as caught:
        preflight(config_of(tmp_path / "to", format="huggingface"), model)
    report = caught.value.report()
    assert "is a file" in report and "format=moe_train" in report
    assert all(f"{family} cannot be this model: " in report for family in FAMILIES)
