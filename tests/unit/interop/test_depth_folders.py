"""Depth, experts in attention, experts that do nothing: no public class takes them, our own layout keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graph_folders import VOCAB, changed, exported, folder_of, keys_refused

from moe_train.config.model import ModelConfig
from moe_train.errors import ConfigError
from moe_train.interop.card import architecture
from moe_train.interop.families import FAMILIES, expressed_by
from moe_train.interop.folder import PublicFolder
from moe_train.interop.native import NATIVE
from moe_train.interop.start import load_first_weights, plan_start
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange

SMALL: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2}
DEPTH = {"kind": "mixture_of_depths", "capacity": 0.5, "predictor_dim": 5}
SPARSE = {"num_experts": 4, "expert_dim": 12}
MODELS: dict[str, ModelConfig] = {
    name: ModelConfig.model_validate(SMALL | keys)
    for name, keys in {
        "depth": {"depth": DEPTH},
        "depth, classifier, experts inside, one module ahead": {
            "depth": DEPTH | {"causal": "classifier"}, "ffn": SPARSE, "mtp": {"depth": 1}
        },
        "depth, coupled networks": {"depth": DEPTH, "ffn": {**SPARSE, "graph": {}}},
        "experts in attention": {"attention": {"kind": "switchhead", "experts": 3}},
        "experts in attention and beyond, depth": {
            "attention": {"kind": "switchhead"}, "ffn": SPARSE, "depth": DEPTH
        },
        "experts that do nothing": {"ffn": {**SPARSE, "num_noop_experts": 2}},
        "experts that do nothing, depth": {"ffn": {**SPARSE, "num_noop_experts": 2}, "depth": DEPTH},
    }.items()
}  # fmt: skip
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
REASONS = {
    "depth": "some blocks take only some tokens of a sequence",
    "switchhead": "attention is of kind switchhead",
    "noop": "num_noop_experts=2: this class has no experts that do nothing",
}


def reasons_of(model: ModelConfig) -> set[str]:
    """What every class must say of it."""
    found = {"depth"} if model.depth.kind != "full" else set()
    found |= {"switchhead"} if model.attention.kind == "switchhead" else set()
    return found | ({"noop"} if model.ffn.num_noop_experts else set())


@every_model
def test_every_class_says_why_it_is_not_the_model(model: ModelConfig) -> None:
    reasons = expressed_by(model)
    assert isinstance(reasons, list)
    for key in reasons_of(model):
        saying = {reason.partition(":")[0] for reason in reasons if REASONS[key] in reason}
        assert saying == set(FAMILIES) or (key == "noop" and saying), (key, saying)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_class_takes_its_own_model_but_not_with_depth(model_type: str) -> None:
    assert FAMILIES[model_type].refusals(changed(model_type, depth=DEPTH)) == [REASONS["depth"]]
    own = changed(model_type)
    if own.ffn.num_experts:
        (reason,) = FAMILIES[model_type].refusals(changed(model_type, ffn={"num_noop_experts": 2}))
        assert REASONS["noop"] in reason


def filled(config: ModelConfig, seed: int) -> Transformer:
    model = build_model(config, VOCAB, LocalExchange(config.ffn.num_experts), "fp32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.4, generator=generator)
    return model.eval()


@every_model
def test_our_own_layout_keeps_every_tensor_and_the_same_logits(
    model: ModelConfig, tmp_path: Path, world: Any, mesh: Any
) -> None:
    to = tmp_path / "run" / "to"
    written = exported(model, to, world, mesh)
    found = NATIVE.architecture(json.loads((to / "config.json").read_text()))
    assert found.problems == []
    assert ModelConfig.model_validate(found.model).model_copy(update={"vocab_size": None}) == model
    again = filled(model.model_copy(update={"init_from": str(to)}), seed=1)
    load_first_weights(again, world, seed=0)
    for name, tensor in written.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tokens_BS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    for training in (False, True):
        pair = [one.train(training)(tokens_BS).logits_BSV for one in (again, written)]
        assert torch.equal(*pair)


def stated(model: ModelConfig, **depth: object) -> ModelConfig:
    """The model as it is configured for a start, with other keys of its depth."""
    section = model.depth.model_copy(update=depth)
    return model.model_copy(update={"depth": section, "vocab_size": VOCAB, "init_from": "folder"})


def test_the_weight_of_the_causal_loss_is_the_users_the_others_are_the_folders() -> None:
    model = MODELS["depth"]
    assert plan_start(stated(model, causal_coef=0.5), VOCAB, folder_of(model)).segments is None
    other = {"capacity": 0.25, "every": 1, "weight": "sigmoid", "causal": "classifier", "predictor_dim": 4}
    assert keys_refused(stated(model, **other), folder_of(model)) == {f"model.depth.{key}" for key in other}


def test_a_dense_model_is_not_upcycled_to_blocks_that_take_only_some_tokens() -> None:
    dense = MODELS["depth"]
    sparse = ModelConfig.model_validate(
        SMALL | {"depth": DEPTH, "ffn": {**SPARSE, "expert_dim": 512}, "vocab_size": VOCAB, "init_from": "folder"}
    )
    with pytest.raises(ConfigError, match=r"is not made of a dense one: set model\.depth\.kind=full"):
        plan_start(sparse, VOCAB, folder_of(dense))
    public = FAMILIES["llama"].public_config(changed("llama"), VOCAB) | {"model_type": "llama"}
    folder = PublicFolder(Path("folder"), public, None, {})  # type: ignore[arg-type]
    own = changed("llama", depth=DEPTH, ffn={"num_experts": 4, "expert_dim": changed("llama").ffn.hidden_dim})
    with pytest.raises(ConfigError, match=f"cannot be this model: {REASONS['depth']}"):
        plan_start(own.model_copy(update={"vocab_size": VOCAB, "init_from": "folder"}), VOCAB, folder)


def test_the_card_says_which_tokens_pass() -> None:
    assert architecture(MODELS["depth"]) == (
        "2 layers of width 16, 2 heads (gqa), 1 in 2 of them for 0.5 of the tokens, dense"
    )
