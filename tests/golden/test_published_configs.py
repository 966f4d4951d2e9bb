"""Presets are the published models: the same architecture as the config.json of their release, the same parameters.

The mappings below hold what each release's config.json says about architecture.
"""

import functools
from typing import Any

import pytest
import torch
import transformers

from moe_train.config.compose import compose_config
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.interop.families import FAMILIES, expressed_by
from moe_train.models.build import is_moe_layer
from moe_train.models.counts import count

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip
DEEPSEEK_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 2, "n_routed_experts": 160, "routed_scaling_factor": 16.0, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    "attention_bias": False, "max_position_embeddings": 163840,
    "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
QWEN2_MOE = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "use_sliding_window": False, "tie_word_embeddings": False, "decoder_sparse_step": 1, "norm_topk_prob": False,
    "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False,
    "attention_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32,
    "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True, "rms_norm_eps": 1e-5,
    "rope_theta": 150000, "swiglu_limit": 7.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
RELEASED: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": MIXTRAL,
    "mixtral_8x22b": MIXTRAL | {
        "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "num_attention_heads": 48, "max_position_embeddings": 65536,
    },
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2_lite": DEEPSEEK_V2 | {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "q_lora_rank": None,
        "routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    },
    "deepseek_v3": DEEPSEEK_V2 | {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1, "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "qwen1_5_moe_a2_7b": QWEN2_MOE | {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4,
    },
    "qwen2_57b_a14b": QWEN2_MOE | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
        "num_experts": 64, "num_experts_per_tok": 8,
    },
    "qwen3_30b_a3b": QWEN3_MOE,
    "qwen3_235b_a22b": QWEN3_MOE | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
    "olmoe_1b_7b": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
    "gpt_oss_20b": GPT_OSS,
    "gpt_oss_120b": GPT_OSS | {
        "num_hidden_layers": 36, "num_local_experts": 128, "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
}  # fmt: skip


@functools.cache
def preset(name: str) -> ModelConfig:
    return compose_config("train", TrainConfig, lambda config: [], [f"model={name}"]).model


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What the outputs depend on, equal things written equally; how the model is trained is left out."""
    model = config.model_dump()
    attention, ffn = model["attention"], model["ffn"]
    if attention["kind"] == "gqa":
        attention["kv_heads"] = attention["kv_heads"] or config.heads
        attention["head_dim"] = attention["head_dim"] or config.dim // config.heads
    ffn["expert_activation"] = ffn["expert_activation"] or ffn["activation"]
    ffn["shared_dim"] = ffn["num_shared_experts"] * (ffn["shared_dim"] or ffn["expert_dim"])
    if all(is_moe_layer(config.ffn, layer) for layer in range(config.layers)):
        del ffn["hidden_dim"]
        if not config.ffn.num_shared_experts:
            del ffn["activation"]
    for section, training in ((ffn, ("balance", "capacity", "num_shared_experts")), (model, ("init_std", "init_from"))):
        for key in training:
            del section[key]
    return model | {"mtp": config.mtp.depth}


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_is_the_architecture_of_its_release(name: str) -> None:
    public = RELEASED[name]
    found = FAMILIES[public["model_type"]].architecture(public)
    assert found.problems == []
    assert architecture(preset(name)) == architecture(ModelConfig.model_validate(found.model))


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_can_be_exported_to_the_class_of_its_release(name: str) -> None:
    family = expressed_by(preset(name))
    assert not isinstance(family, list), family
    assert family.model_type == RELEASED[name]["model_type"]


@pytest.mark.parametrize("name", ["deepseek_moe_16b", "switch_base_8", "glam_64b_64e"])
def test_what_has_no_public_class_is_exported_with_reasons(name: str) -> None:
    assert isinstance(expressed_by(preset(name)), list)


@pytest.mark.parametrize("name", ["deepseek_v3_tiny", "sparse_tiny"])
def test_small_models_can_be_exported(name: str) -> None:
    assert not isinstance(expressed_by(preset(name)), list)


@pytest.mark.parametrize("name", RELEASED)
def test_the_class_of_transformers_has_as_many_parameters(name: str) -> None:
    """The public classes leave multi-token prediction out."""
    config = transformers.AutoConfig.for_model(**RELEASED[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    size = count(preset(name), vocab_size=1, seq_len=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == size.main
