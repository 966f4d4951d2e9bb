"""What a folder may become: the same model, the same with other training keys, or a dense one upcycled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.errors import ConfigError
from moe_train.interop.adopt import adopted
from moe_train.interop.families import FAMILIES
from moe_train.interop.folder import PublicFolder
from moe_train.interop.start import plan_start

VOCAB = 512
MIXTRAL = ("model=sparse_tiny", "model.ffn.router.scale=1.0")
V3 = ("model=deepseek_v3_tiny",)
LLAMA = ("model=dense_tiny",)
KINDS = {"mixtral": MIXTRAL, "deepseek_v3": V3, "llama": LLAMA}


def model(*overrides: str) -> ModelConfig:
    return compose_config("train", TrainConfig, lambda config: [], ["model.init_from=folder", *overrides]).model


def folder(kind: str, *overrides: str, names: tuple[str, ...] = ()) -> PublicFolder:
    """A folder of which only config.json and the names of tensors are looked at."""
    family = FAMILIES[kind]
    public = family.public_config(model(*KINDS[kind], *overrides), VOCAB) | {"model_type": kind}
    found = PublicFolder(Path("folder"), public, None, {})  # type: ignore[arg-type]
    found.shapes = dict.fromkeys(names, (1,))
    return found


def keys_refused(stated: ModelConfig, found: PublicFolder, vocab_size: int = VOCAB) -> set[str]:
    with pytest.raises(ConfigError) as caught:
        plan_start(stated, vocab_size, found)
    return {problem.key for problem in caught.value.problems}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_starts_from_its_folder(kind: str) -> None:
    stated = model(*KINDS[kind])
    start = plan_start(stated, VOCAB, folder(kind, names=("model.layers.4.eh_proj.weight",)))
    assert start.segments is None
    assert set(start.expected.parts) == set(FAMILIES[kind].parts(stated, VOCAB))
    assert not start.expected.fresh


def test_training_keys_may_differ() -> None:
    stated = model(
        *MIXTRAL, "model.init_std=0.5", "model/ffn/balance=[sequence]", "model/ffn/capacity=reroute",
        "model.ffn.router.jitter=0.1", "model.upcycle.noise=0.5",
    )  # fmt: skip
    assert plan_start(stated, VOCAB, folder("mixtral")).segments is None


def test_a_scale_that_the_class_cannot_say_is_folded_into_the_experts() -> None:
    """sparse_tiny averages nothing: its scale of two enters the second projection of each expert."""
    parts = plan_start(model("model=sparse_tiny"), VOCAB, folder("mixtral")).expected.parts
    assert {part.factor for part in parts["blocks.0.ffn.experts.down_LFD"]} == {0.5}


def test_every_difference_is_listed_with_both_values() -> None:
    stated = model(*MIXTRAL, "model.layers=3", "model.ffn.expert_dim=128", "model.attention.rope_theta=5.0")
    keys = {"model.layers", "model.ffn.expert_dim", "model.attention.rope_theta"}
    assert keys_refused(stated, folder("mixtral")) == keys
    assert keys_refused(model(*MIXTRAL), folder("mixtral"), VOCAB + 1) == {"model.vocab_size"}
    with pytest.raises(ConfigError, match=r"model.layers=3: is 4 in model.init_from"):
        plan_start(model(*MIXTRAL, "model.layers=3"), VOCAB, folder("mixtral"))


def test_a_model_of_another_family_is_refused_with_the_reasons() -> None:
    assert keys_refused(model(*V3), folder("mixtral")) == {"model"}
    assert keys_refused(model(*LLAMA), folder("mixtral")) == {"model"}


def test_what_was_adopted_may_be_overridden() -> None:
    stated = model(*MIXTRAL, "model.adopt=true", "model.attention.rope_theta=5.0")
    assert plan_start(stated, VOCAB, folder("mixtral")).segments is None


def test_modules_that_a_folder_lacks_start_from_random_values(caplog: pytest.LogCaptureFixture) -> None:
    """transformers saves no module for multi-token prediction, whatever its config.json says."""
    start = plan_start(model(*V3), VOCAB, folder("deepseek_v3"))
    assert "mtp.0.project.weight" in start.expected.fresh
    assert not any(name.startswith("mtp.") for name in start.expected.parts)
    assert "holds 0 of 1 modules" in caplog.text


def test_a_dense_folder_becomes_experts() -> None:
    stated = model("model=sparse_tiny", "model.ffn.expert_dim=256")
    start = plan_start(stated, VOCAB, folder("llama"))
    assert start.segments is not None and start.segments.number == 2
    assert "blocks.0.ffn.experts.gate_up_LDF2" in start.expected.parts
    assert "blocks.0.ffn.router.weight" not in start.expected.parts
    assert "blocks.0.ffn.router.weight" in start.expected.fresh


def test_a_dense_folder_that_would_not_be_equal_is_refused_with_every_reason() -> None:
    stated = model("model=sparse_tiny", "model.ffn.expert_dim=300", "model.ffn.router.normalize=none")
    with pytest.raises(ConfigError) as caught:
        plan_start(stated, VOCAB, folder("llama"))
    assert len(caught.value.problems) == 2


def composed(**run: Any) -> dict[str, Any]:
    return {
        "run": {"dir": "absent"} | run,
        "model": {
            "init_from": "", "adopt": True, "upcycle": {"noise": 0.0}, "dim": 7, "layers": 9,
            "ffn": {"balance": {"aux": {}}, "top_k": 5, "router": {"kind": "topk"}}, "attention": {"kind": "gqa"},
        },
    }  # fmt: skip


def folder_on_disk(path: Path) -> str:
    import json

    public = FAMILIES["mixtral"].public_config(model(*MIXTRAL), VOCAB) | {"model_type": "mixtral"}
    (path / "config.json").write_text(json.dumps(public))
    return str(path)


def test_an_adopted_architecture_replaces_what_was_composed_but_for_the_users_keys(tmp_path: Path) -> None:
    mapping = composed()
    mapping["model"]["init_from"] = folder_on_disk(tmp_path)
    found = adopted(mapping, frozenset({"model.ffn.top_k", "model/ffn/balance", "train.steps", "model"}))["model"]
    assert (found["dim"], found["layers"], found["vocab_size"]) == (256, 4, VOCAB)
    assert found["ffn"]["top_k"] == 5
    assert found["ffn"]["balance"] == {"aux": {}}
    assert found["ffn"]["router"]["kind"] == "topk_softmax"
    assert found["adopt"] is True and found["init_from"] == str(tmp_path)
    assert mapping["model"]["dim"] == 7, "the mapping that was given stays as it is"


def test_a_run_that_goes_on_needs_no_folder(tmp_path: Path) -> None:
    import yaml

    mapping = composed(dir=str(tmp_path))
    mapping["model"]["init_from"] = "gone"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"dim": 64, "adopt": True, "init_from": "gone"}}))
    assert adopted(mapping, frozenset())["model"]["dim"] == 64
