"""config.json both ways: published files, defaults, refusals, rotary positions, layer patterns."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from family_samples import YARN, class_config, config_of, model_of
from hypothesis import given, settings
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.errors import DataError
from moe_train.interop.families import FAMILIES, family_of
from moe_train.models.attention import rotary_width
from moe_train.models.build import is_moe_layer
from moe_train.ops.rotary import frequencies, rotary_magnitude, score_magnitude

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
DEEPSEEK_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096,
                 "type": "yarn"}  # fmt: skip
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Mixtral-8x7B": (46_702_792_704, {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000}),
    "DeepSeek-V2": (235_741_434_880, {
        "model_type": "deepseek_v2", **LATENT, "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6,
        "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536, "rope_theta": 10000,
        "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 16.0,
        "scoring_func": "softmax", "seq_aux": True, "topk_group": 3, "topk_method": "group_limited_greedy",
        "max_position_embeddings": 163840, "vocab_size": 102400}),
    "DeepSeek-V2-Lite": (15_706_484_224, {
        "model_type": "deepseek_v2", **LATENT, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "topk_group": 1,
        "topk_method": "greedy", "max_position_embeddings": 163840, "vocab_size": 102400}),
    "DeepSeek-V3": (671_026_419_200, {
        "model_type": "deepseek_v3", **LATENT, "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "quantization_config": {"quant_method": "fp8"},
        "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "max_position_embeddings": 163840,
        "vocab_size": 129280}),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
        "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False,
        "vocab_size": 151936}),
    "Qwen2-57B-A14B": (57_408_658_944, {
        "model_type": "qwen2_moe", "hidden_size": 3584, "intermediate_size": 18944, "moe_intermediate_size": 2560,
        "norm_topk_prob": False, "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": 65536,
        "shared_expert_intermediate_size": 20480, "use_sliding_window": False, "vocab_size": 151936}),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936}),
    "OLMoE-1B-7B": (6_919_161_856, {
        "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304}),
    "gpt-oss-20b": (20_914_757_184, {
        "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                         "original_max_position_embeddings": 4096, "truncate": False},
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088}),
    "gpt-oss-120b, by defaults": (116_829_156_672, {"model_type": "gpt_oss"}),
}  # fmt: skip
"""Elements of all tensors, and the keys of the published config.json that matter."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_all_their_parameters(name):
    count, public = PUBLISHED[name]
    family = FAMILIES[public["model_type"]]
    model = model_of(public)
    parts = [part for pieces in family.parts(model, model.vocab_size).values() for part in pieces]
    assert sum(math.prod(shape) for shape in {part.name: part.shape for part in parts}.values()) == count
    # What we would write of it says the same.
    again = family.public_config(model, model.vocab_size) | {"max_position_embeddings": 131072}
    assert family.refusals(model) == [] and model_of(again) == model
    for key in set(again) & set(public) - {"max_position_embeddings", "rope_scaling", "n_group", "topk_group"}:
        # Said once and for all by the papers, not used, and left out with its tensors.
        if key not in ("aux_loss_alpha", "sliding_window", "num_nextn_predict_layers"):
            assert again[key] == public[key], key


def test_prediction_module_of_v3_has_its_parameters():
    public = PUBLISHED["DeepSeek-V3"][1]
    model = model_of(public, {"model.layers.61.eh_proj.weight"})
    parts = FAMILIES["deepseek_v3"].parts(model, 129280)
    pieces = [part for name, pieces in parts.items() if name.startswith("mtp.") for part in pieces]
    # The reference's number holds the 256 values of the bias on the choice.
    assert sum(math.prod(part.shape) for part in pieces) == 11_610_068_224


def test_training_follows_the_papers():
    v2, lite, v3 = (model_of(PUBLISHED[f"DeepSeek-{name}"][1]).ffn for name in ("V2", "V2-Lite", "V3"))
    assert (v2.balance.aux.coef, v2.balance.aux.scope) == (0.003, "sequence")
    assert (v2.balance.device.coef, v2.balance.device.devices) == (0.05, 8)
    assert (v2.balance.communication.coef, v2.balance.communication.devices) == (0.02, 8)
    assert (v2.router.group_score, v2.router.scores, v2.router.normalize) == ("max", "softmax", "none")
    assert (lite.balance.aux.coef, lite.balance.aux.scope, lite.balance.device) == (0.001, "sequence", None)
    assert (lite.router.kind, lite.router.normalize) == ("topk", "none")
    assert (v3.balance.loss_free.rate, v3.balance.aux.coef, v3.balance.aux.scope) == (0.001, 1e-4, "sequence")
    assert (v3.router.scale, v3.router.groups, v3.router.top_groups, v3.router.group_score) == (2.5, 8, 4, "top2")
    mixtral = model_of(PUBLISHED["Mixtral-8x7B"][1] | {"router_jitter_noise": 0.1}).ffn
    assert (mixtral.router.jitter, mixtral.balance.aux.coef) == (0.1, 0.02)
    assert model_of(config_of("mixtral", router_aux_loss_coef=0.0)).ffn.balance.aux is None
    assert model_of(config_of("mixtral", initializer_range=0.006)).init_std == 0.006


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_the_class(model_type):
    family = FAMILIES[model_type]
    needed = {"num_experts_per_tok": 2} if model_type == "deepseek_v2" else {}
    known = class_config(needed | {"model_type": model_type})
    theirs = known.to_dict() | {"rope_theta": known.rope_parameters["rope_theta"]}
    theirs["rope_parameters"] = {key: v for key, v in known.rope_parameters.items() if key != "rope_theta"}
    # Made None or 0 when it is not used; and what the files say, the class does not know.
    not_of_the_class = {"aux_loss_alpha", "seq_aux"} | ({"sliding_window"} if "qwen" in model_type else set())
    for key, value in family.defaults.items():
        if key not in not_of_the_class:
            assert getattr(known, key, theirs.get(key)) == value or theirs[key] == value, key
    # Nothing that the class states differs from what we take for missing.
    stated = family.architecture(known.to_dict() | {"model_type": model_type})
    silent = family.architecture(needed | {"model_type": model_type})
    assert stated == silent and stated.problems == []


def test_missing_number_without_default_is_a_problem():
    problems = FAMILIES["deepseek_v2"].architecture({"model_type": "deepseek_v2"}).problems
    assert [problem.key for problem in problems] == ["config.json num_experts_per_tok"]


def test_all_problems_at_once():
    config = config_of("deepseek_v3", hidden_act="gelu", attention_bias=True, moe_layer_freq=2, hidden_size="wide",
                       rope_scaling={"type": "linear", "factor": 2.0}, sliding_window=7, topk_method="greedy",
                       rope_interleave=False, num_key_value_heads=2)  # fmt: skip
    problems = FAMILIES["deepseek_v3"].architecture(config).problems
    assert {problem.key.removeprefix("config.json ") for problem in problems} == {
        "hidden_act", "attention_bias", "moe_layer_freq", "hidden_size", "rope_parameters.rope_type",
        "sliding_window", "topk_method", "rope_interleave", "num_key_value_heads",
    }  # fmt: skip
    assert len(problems) == 9 and all(problem.rule and problem.remedy for problem in problems)


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "mlp_bias": ("llama", {"mlp_bias": True}),
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}),
    "head_dim": ("olmoe", {"head_dim": 12}),
    "attention_dropout": ("mixtral", {"attention_dropout": 0.1}),
    "partial_rotary_factor": ("llama", {"partial_rotary_factor": 0.5}),
    "rope_parameters.partial_rotary_factor": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "rope_parameters.rope_type": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}),
    "rope_parameters": ("qwen3_moe", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}),
    "rope_parameters.factor": ("llama", {"rope_scaling": YARN | {"factor": 0.5}}),
    "rope_parameters.beta_fast": ("llama", {"rope_scaling": YARN | {"beta_fast": "fast"}}),
    "rope_parameters.attention_factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 0.5}}),
    "rope_parameters.mscale": ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 0.707}}),
    "attention_multiplier": ("llama", {"attention_multiplier": 0.1}),
    "residual_multiplier": ("llama", {"residual_multiplier": 0.5}),
    "sliding_window": ("llama", {"sliding_window": 8}),
    "layer_types": ("mixtral", {"layer_types": ["sliding_attention", "full_attention"]}),
    "layer_types ": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
    "layer_types  ": ("gpt_oss", {"layer_types": ["chunked_attention", "full_attention"]}),
    "use_sliding_window": ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}),
    "max_window_layers": ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 1}),
    "mlp_only_layers": ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
    "mlp_only_layers ": ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    "shared_expert_intermediate_size": ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
    "swiglu_alpha": ("gpt_oss", {"swiglu_alpha": 1.0}),
    "swiglu_limit": ("gpt_oss", {"swiglu_limit": 5.0}),
    "norm_topk_prob": ("deepseek_v2", {"norm_topk_prob": True}),
    "scoring_func": ("deepseek_v2", {"scoring_func": "sigmoid"}),
    "topk_method": ("deepseek_v2", {"topk_method": "noaux_tc"}),
    "n_group": ("deepseek_v2", {"topk_method": "group_limited_greedy", "topk_group": 2}),
    "moe_layer_freq": ("deepseek_v2", {"moe_layer_freq": 2}),
    "num_hidden_layers": ("llama", {"num_hidden_layers": "2"}),
    "rms_norm_eps": ("llama", {"rms_norm_eps": None}),
}


@pytest.mark.parametrize("key", BAD)
def test_what_is_not_covered_is_refused(key):
    model_type, changes = BAD[key]
    problems = FAMILIES[model_type].architecture(config_of(model_type, **changes)).problems
    assert [problem.key for problem in problems] == [f"config.json {key.strip()}"], problems
    assert FAMILIES[model_type].architecture(config_of(model_type)).problems == []


def test_unknown_kinds_name_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"model_type=gpt2: .*llama, mixtral.*deepseek_v2"):
        family_of({"model_type": "gpt2"}, tmp_path / "config.json")
    with pytest.raises(DataError, match="model_type"):
        family_of({}, tmp_path / "config.json")
    assert family_of({"model_type": "olmoe"}, tmp_path).class_name == "OlmoeForCausalLM"


positive = st.floats(0.05, 4.0)
yarns = st.fixed_dictionaries(
    {"factor": st.floats(1.01, 64.0), "original_max_position_embeddings": st.integers(64, 4096)},
    optional={"beta_fast": st.floats(8.0, 64.0), "beta_slow": st.floats(0.5, 4.0), "truncate": st.booleans(),
              "attention_factor": st.floats(0.9, 2.0), "mscale": positive, "mscale_all_dim": positive},
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(model_type=st.sampled_from(["llama", "gpt_oss", "deepseek_v2", "deepseek_v3"]), yarn=yarns,
       theta=st.floats(100.0, 1e6), is_new=st.booleans())  # fmt: skip
def test_stretched_positions_are_those_of_transformers(model_type, yarn, theta, is_new):
    scaling = {"rope_type" if is_new else "type": "yarn", **yarn}
    place = {"rope_parameters": scaling | {"rope_theta": theta}} if is_new else {
        "rope_scaling": scaling, "rope_theta": theta}  # fmt: skip
    public = config_of(model_type, **place)
    family = FAMILIES[model_type]
    found = family.architecture(public)
    if found.problems:
        keys = {problem.key.split(".")[-1] for problem in found.problems}
        assert keys <= {"attention_factor", "mscale"}
        assert ("attention_factor" in yarn) == ("attention_factor" in keys) or "deepseek" not in model_type
        return
    model = ModelConfig.model_validate(found.model)
    again = family.public_config(model, 61) | {"max_position_embeddings": 64}
    for config in (public, again):
        theirs = class_config(config)
        inverse_W, size = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
        mine_W = frequencies(rotary_width(model), model.attention, torch.device("cpu"))
        assert torch.allclose(mine_W.float(), inverse_W, rtol=1e-5)
        assert math.isclose(rotary_magnitude(model.attention.yarn), size, rel_tol=1e-9)
        if "deepseek" in model_type:
            scores = yarn_apply_mscale(theirs.rope_parameters, 1.0)
            assert math.isclose(score_magnitude(model.attention.yarn), scores, rel_tol=1e-9)
    assert ModelConfig.model_validate(family.architecture(again).model).attention.yarn.model_dump() == pytest.approx(
        model.attention.yarn.model_dump())  # fmt: skip


def test_missing_factor_is_the_ratio_of_lengths():
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    assert model_of(config_of("llama", rope_scaling=scaling)).attention.yarn.factor == 4.0
    assert model_of(config_of("llama", rope_scaling=scaling | {"factor": 1.0})).attention.yarn is None


def test_old_names_and_new_ones_agree():
    old = config_of("mixtral", rope_theta=777.0, rope_scaling=YARN | {"type": "yarn"})
    new = config_of("mixtral", rope_parameters=YARN | {"rope_theta": 777.0})
    assert model_of(old) == model_of(new) != model_of(config_of("mixtral"))
    assert model_of(config_of("mixtral")).attention.rope_theta == 1e6
    experts = config_of("qwen3_moe") | {"num_local_experts": 6}
    del experts["num_experts"]
    assert model_of(experts) == model_of(config_of("qwen3_moe"))


@settings(deadline=None, max_examples=200)
@given(layers=st.integers(1, 6), every=st.integers(1, 3), listed=st.lists(st.integers(0, 6), max_size=4))
def test_dense_layers_of_qwen(layers, every, listed):
    public = config_of("qwen3_moe", num_hidden_layers=layers, decoder_sparse_step=every, mlp_only_layers=listed)
    found = FAMILIES["qwen3_moe"].architecture(public)
    sparse = [i for i in range(layers) if i not in listed and (i + 1) % every == 0]
    ffn = FFNConfig.model_validate(found.model["ffn"])
    if found.problems:
        starts = range(layers if sparse else 0)
        assert all([i for i in range(first, layers) if (i + 1) % every == 0] != sparse for first in starts)
    else:
        assert [i for i in range(layers) if is_moe_layer(ffn, i)] == sparse


@settings(deadline=None, max_examples=100)
@given(layers=st.integers(1, 7), full_every=st.none() | st.integers(2, 4))
def test_patterns_of_windows(layers, full_every):
    types = ["sliding_attention" if full_every is None or (i + 1) % full_every else "full_attention"
             for i in range(layers)]  # fmt: skip
    model = model_of(config_of("gpt_oss", num_hidden_layers=layers, layer_types=types))
    assert model.attention.window == 5
    shown = full_every if full_every is not None and full_every <= layers else None
    assert model.attention.full_every == shown
    assert FAMILIES["gpt_oss"].public_config(model, 61)["layer_types"] == types
