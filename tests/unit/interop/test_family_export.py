"""Models of our own that a public class can express: transformers loads them and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_samples import (
    VOCAB,
    build,
    config_of,
    distance,
    emptied,
    exported,
    fill,
    imported,
    model_of,
    random_public,
    random_tokens,
    randomise,
    read,
)
from transformers import DeepseekV3ForCausalLM, GenerationConfig
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from moe_train.config.model import ModelConfig
from moe_train.config.rules import model_problems
from moe_train.interop.families import FAMILIES, expressed_by
from moe_train.models.transformer import Transformer

SIZES = {"dim": 32, "layers": 3, "heads": 4, "tie_embeddings": False, "norm_eps": 1e-4}
GQA = {"kind": "gqa", "kv_heads": 2}
MLA = {"kind": "mla", "q_rank": 10, "kv_rank": 14, "nope_dim": 6, "rope_dim": 8, "v_dim": 10}
MOE = {"num_experts": 8, "top_k": 3, "expert_dim": 12, "hidden_dim": 20}
STRETCHED = {"factor": 4.0, "original_length": 16}


def ours_of(attention: dict[str, Any], ffn: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**SIZES, "attention": attention, "ffn": ffn, **more}


def router(kind: str, **keys: Any) -> dict[str, Any]:
    return {"router": {"kind": kind, **keys}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, yarn": ("llama", ours_of({**GQA, "yarn": {**STRETCHED, "mscale": 0.3}}, {"hidden_dim": 20})),
    "folded scale, jitter, capacity in training": (
        "mixtral",
        ours_of({**GQA, "window": 4}, {**MOE, **router("topk", scale=2.5, jitter=0.1, expert_dropout=0.1),
                "capacity": {"kind": "factor"}}, tie_embeddings=True),
    ),
    "topk_softmax": ("mixtral", ours_of(GQA, {**MOE, **router("topk_softmax", scale=0.5)})),
    "two shared experts, a gate": (
        "qwen2_moe",
        ours_of({**GQA, "qkv_bias": True}, {**MOE, **router("topk", normalize="none", scale=3.0), "shared_gate": True,
                "num_shared_experts": 2, "shared_dim": 7, "first_dense": 1}),
    ),
    "windows in two of three": (
        "qwen2_moe",
        ours_of({**GQA, "window": 4, "full_every": 3, "head_dim": 12},
                {**MOE, **router("topk_softmax"), "shared_gate": True, "num_shared_experts": 1}),
    ),
    "normed heads": (
        "qwen3_moe",
        ours_of({**GQA, "qk_norm": "head", "head_dim": 12}, {**MOE, **router("topk_softmax", scale=1.5), "every": 2}),
    ),
    "normed together": (
        "olmoe", ours_of({**GQA, "qk_norm": "full"}, {**MOE, **router("topk", normalize="none", scale=6.0)})
    ),
    "sinks": (
        "gpt_oss",
        ours_of({**GQA, "sinks": True, "window": 4, "yarn": {**STRETCHED, "truncate": False, "mscale": 2.0}},
                {**MOE, **router("topk_softmax", bias=True, scale=0.7), "activation": "swiglu_clamped",
                 "expert_bias": True}),
    ),
    "sigmoid, nothing shared, no bias": ("deepseek_v3", ours_of(MLA, {**MOE, **router("sigmoid", scale=2.0)})),
    "all groups": (
        "deepseek_v3",
        ours_of({**MLA, "yarn": {**STRETCHED, "mscale": 1.7}},
                {**MOE, **router("group_limited", groups=8, top_groups=8, group_score="max", normalize="none"),
                 "num_shared_experts": 1, "shared_dim": 24, "balance": {"loss_free": {}}}),
    ),
    "groups, tied": (
        "deepseek_v3",
        ours_of({**MLA, "yarn": {**STRETCHED, "mscale": 0.5, "mscale_all_dim": 0.9}},
                {**MOE, **router("group_limited", groups=2, top_groups=1), "num_shared_experts": 1, "first_dense": 1},
                tie_embeddings=True),
    ),
    "softmax, plain": (
        "deepseek_v2",
        ours_of({**MLA, "q_rank": None, "yarn": {**STRETCHED, "mscale": 0.5}},
                {**MOE, **router("topk", normalize="none", scale=2.0), "num_shared_experts": 3}),
    ),
    "softmax, groups": (
        "deepseek_v2",
        ours_of(MLA, {**MOE, **router("group_limited", scores="softmax", group_score="max", normalize="none")}),
    ),
}  # fmt: skip


def random_ours(keys: dict[str, Any]) -> Transformer:
    model = ModelConfig.model_validate(keys)
    assert [str(problem) for problem in model_problems(model)] == []
    torch.manual_seed(1)
    built = build(model)
    randomise(built)
    return built


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_we_do(name, tmp_path):
    model_type, keys = CASES[name]
    ours = random_ours(keys)
    family = expressed_by(ours.config)
    assert not isinstance(family, list), family
    assert family.model_type == model_type
    public = exported(ours, family, tmp_path / "out")
    tokens = random_tokens()
    with torch.no_grad():
        expected = ours(tokens).logits_BSV
        assert distance(public(tokens).logits, expected) < 1e-5
        # And so do we after the way back, whatever is said differently now (folded scales, one group for none).
        assert distance(imported(read(tmp_path / "out"))(tokens).logits_BSV, expected) < 1e-5


@pytest.mark.parametrize("name", ["dense, yarn", "groups, tied", "softmax, plain"])
def test_old_readers_find_rotary_positions_where_they_look(name):
    model_type, keys = CASES[name]
    model = ModelConfig.model_validate(keys)
    public = FAMILIES[model_type].public_config(model, VOCAB)
    scaling = public["rope_scaling"]
    assert public["rope_theta"] == model.attention.rope_theta
    assert scaling["type"] == scaling["rope_type"] == "yarn"
    assert scaling["factor"] == 4.0 and scaling["original_max_position_embeddings"] == 16
    old = {key: value for key, value in public.items() if key != "rope_parameters"}
    new = {key: value for key, value in public.items() if key not in ("rope_theta", "rope_scaling")}
    family = FAMILIES[model_type]
    assert family.architecture(old) == family.architecture(new) == family.architecture(public)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("is_tied", [False, True])
def test_prediction_modules(depth, is_tied, tmp_path, monkeypatch):
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected",
                        [r"model\.layers\.2.*", r"model\.layers\.3.*"])  # fmt: skip
    config = config_of("deepseek_v3", num_nextn_predict_layers=depth, tie_word_embeddings=is_tied)
    model = ModelConfig.model_validate(FAMILIES["deepseek_v3"].architecture(config).model)
    ours = build(model)
    randomise(ours)
    public = exported(ours, FAMILIES["deepseek_v3"], tmp_path / "out")
    tokens = random_tokens()
    with torch.no_grad():
        mine = ours.train()(tokens)
        hidden = public.model(tokens).last_hidden_state
        assert distance(public(tokens).logits, mine.logits_BSV) < 1e-5
        assert len(mine.mtp_logits) == depth
        if depth == 0:
            return
        ahead = MtpModel.from_pretrained(public)
        cache = MtpCache(config=public.config.get_mtp_config())
        for k, logits in enumerate(mine.mtp_logits):
            # Position i takes in token i + k + 1: the last k + 1 positions have none.
            length = tokens.shape[1] - k - 1
            positions = torch.arange(k + 1, tokens.shape[1]).unsqueeze(0)
            hidden = ahead.forward_layer(k, hidden[:, :length], positions, cache, input_ids=tokens[:, k + 1 :])
            assert distance(logits[:, :length], ahead.shared_head(hidden)) < 1e-5


PUBLISHED_MODULE = {
    "embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
    "shared_head.head.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
    "self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight", "mlp.gate.weight", "mlp.gate.e_score_correction_bias",
    *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"mlp.experts.{e}.{name}_proj.weight" for e in range(8) for name in ("gate", "up", "down")),
}  # fmt: skip
"""Names of layer 61 of the published DeepSeek-V3, with 8 experts."""


def test_prediction_modules_have_the_published_names():
    model = model_of(config_of("deepseek_v3", num_nextn_predict_layers=1), {"model.layers.2.eh_proj.weight"})
    parts = [part for pieces in FAMILIES["deepseek_v3"].parts(model, VOCAB).values() for part in pieces]
    names = {part.name.removeprefix("model.layers.2.") for part in parts if part.name.startswith("model.layers.2.")}
    assert names == PUBLISHED_MODULE
    assert {part.name for part in parts if part.copy} == {
        "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"
    }  # fmt: skip


def test_depth_is_what_the_folder_holds():
    config = config_of("deepseek_v3", num_nextn_predict_layers=2)
    first, second = (f"model.layers.{layer}.eh_proj.weight" for layer in (2, 3))
    assert model_of(config).mtp.depth == 0
    assert model_of(config, {first}).mtp.depth == 1
    assert model_of(config, {first, second}).mtp.depth == 2
    # Without the first, the second has nothing to stand on.
    assert model_of(config, {second}).mtp.depth == 0


def test_model_without_bias_writes_zeros():
    keys = CASES["sigmoid, nothing shared, no bias"][1]
    model = ModelConfig.model_validate(keys)
    constants = FAMILIES["deepseek_v3"].constants(model)
    biases = {name: entry for name, entry in constants.items() if name.endswith("e_score_correction_bias")}
    assert set(biases.values()) == {((8,), 0.0)} and len(biases) == 3
    assert all(0 in shape for name, (shape, _) in constants.items() if name not in biases)
    with_bias = ModelConfig.model_validate({**keys, "ffn": {**keys["ffn"], "balance": {"loss_free": {}}}})
    assert not any("bias" in name for name in FAMILIES["deepseek_v3"].constants(with_bias))


def test_greedy_text_is_the_same(tmp_path):
    ours = imported_from("deepseek_v3", tmp_path)
    public = exported(ours, FAMILIES["deepseek_v3"], tmp_path / "out")
    tokens = random_tokens(batch=1, length=7)
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = public.generate(tokens, generation_config=greedy)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, ours(tokens).logits_BSV[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(theirs, tokens)


def imported_from(model_type: str, path) -> Transformer:
    """Our model from a random public one."""
    random_public(config_of(model_type)).save_pretrained(path / "in")
    return imported(read(path / "in"))


def test_loops_are_each_others_inverse():
    ours = random_ours(CASES["sinks"][1])
    parts = FAMILIES["gpt_oss"].parts(ours.config, VOCAB)
    again = build(ours.config)
    fill(again.state_dict(), parts, emptied(ours.state_dict(), parts))
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, rtol=1e-6, atol=0), name
