"""Every family: transformers' model and ours compute the same, forwards and backwards, and come back unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_samples import (
    YARN,
    Folder,
    build,
    config_of,
    distance,
    emptied,
    exported,
    imported,
    model_of,
    random_public,
    random_tokens,
    saved,
)
from torch import Tensor
from transformers import PreTrainedModel

from moe_train.interop.families import FAMILIES, expressed_by
from moe_train.models.transformer import Transformer

HALVED = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 8, "beta_slow": 2}
UNEVEN = YARN | {"mscale": 1.3, "mscale_all_dim": 0.4}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 0.5, "high_freq_factor": 2.0}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": config_of("llama"),
    "llama heads": config_of("llama", hidden_size=36, num_attention_heads=6, num_key_value_heads=3, head_dim=10,
                             attention_bias=True),
    "llama tied, multi-head": config_of("llama", num_key_value_heads=4, tie_word_embeddings=True, rope_theta=500.0),
    "llama yarn": config_of("llama", rope_scaling=YARN, rms_norm_eps=1e-3),
    "llama yarn, factor": config_of("llama", rope_scaling=YARN | {"attention_factor": 1.4, "truncate": False}),
    "llama 3.1": config_of("llama", rope_scaling=LLAMA3),
    "llama yarn, as without": config_of("llama", rope_scaling=HALVED),
    "mixtral": config_of("mixtral"),
    "mixtral window, tied": config_of("mixtral", sliding_window=4, tie_word_embeddings=True, num_hidden_layers=3),
    "mixtral heads": config_of("mixtral", num_attention_heads=3, num_key_value_heads=1, head_dim=10,
                               num_local_experts=3, num_experts_per_tok=3),
    "qwen2": config_of("qwen2_moe"),
    "qwen2 dense between": config_of("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2, norm_topk_prob=True),
    "qwen2 dense first": config_of("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[0], qkv_bias=False),
    "qwen2 window": config_of("qwen2_moe", num_hidden_layers=4, use_sliding_window=True, sliding_window=3,
                              max_window_layers=4, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": config_of("qwen3_moe", norm_topk_prob=True),
    "qwen3 plain weights": config_of("qwen3_moe", head_dim=12, num_key_value_heads=1, attention_bias=True),
    "qwen3 dense between": config_of("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[0, 1],
                                     tie_word_embeddings=True, norm_topk_prob=True),
    "qwen3 window, yarn": config_of("qwen3_moe", use_sliding_window=True, sliding_window=6, rope_scaling=UNEVEN),
    "olmoe": config_of("olmoe"),
    "olmoe heads": config_of("olmoe", num_attention_heads=8, num_key_value_heads=1, norm_topk_prob=True,
                             attention_bias=True, tie_word_embeddings=True),
    "gpt_oss": config_of("gpt_oss"),
    "gpt_oss heads": config_of("gpt_oss", num_attention_heads=6, num_key_value_heads=2, head_dim=10,
                               attention_bias=False, num_hidden_layers=3, num_experts_per_tok=1),
    "gpt_oss all layers full, no yarn": config_of("gpt_oss", layer_types=["full_attention"] * 2,
                                                  tie_word_embeddings=True,
                                                  rope_parameters={"rope_type": "default", "rope_theta": 99.0}),
    "gpt_oss windows in two of three": config_of("gpt_oss", num_hidden_layers=3, rope_scaling=YARN,
                                                 layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    "v2 greedy": config_of("deepseek_v2", q_lora_rank=None, rope_scaling=HALVED, first_k_dense_replace=0),
    "v2 groups": config_of("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2,
                           routed_scaling_factor=3.5, num_hidden_layers=3, first_k_dense_replace=2),
    "v2 odd": config_of("deepseek_v2", topk_method="group_limited_greedy", n_group=1, topk_group=1,
                        n_shared_experts=1, num_attention_heads=3, num_key_value_heads=3, hidden_size=33,
                        tie_word_embeddings=True, rope_scaling=YARN),
    "v3": config_of("deepseek_v3", rope_scaling=UNEVEN),
    "v3 one group": config_of("deepseek_v3", n_group=1, topk_group=1, norm_topk_prob=False, q_lora_rank=None,
                              first_k_dense_replace=0),
    "v3 two groups": config_of("deepseek_v3", n_group=2, topk_group=1, n_shared_experts=1, num_hidden_layers=3,
                               first_k_dense_replace=2, rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "v3 tied, stated factor": config_of("deepseek_v3", tie_word_embeddings=True, num_nextn_predict_layers=1,
                                        rope_scaling=UNEVEN | {"attention_factor": 1.2}),
    "v3 no shared expert": config_of("deepseek_v3", n_shared_experts=0),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[PreTrainedModel, Folder, Transformer]:
    public = random_public(CASES[request.param])
    folder = saved(public, tmp_path_factory.mktemp("public"))
    return public, folder, imported(folder)


def test_logits_are_the_same(case):
    public, _, ours = case
    tokens = random_tokens()
    with torch.no_grad():
        assert distance(ours(tokens).logits_BSV, public(tokens).logits) < 1e-5


def test_gradients_are_the_same(case, tmp_path):
    public, folder, ours = case
    tokens = random_tokens()
    for model in (public, ours):
        model.zero_grad()
    loss_of(public(tokens).logits, tokens).backward()
    loss_of(ours(tokens).logits_BSV, tokens).backward()
    theirs = gradients_on_disk(public, tmp_path)
    parts = FAMILIES[folder.config["model_type"]].parts(ours.config, folder.config["vocab_size"])
    gradients = {name: tensor.grad for name, tensor in ours.named_parameters()}
    mine = emptied(gradients, {name: pieces for name, pieces in parts.items() if name in gradients})
    largest = max(tensor.abs().max().item() for tensor in mine.values())
    assert len(mine) >= len(theirs) - folder.config["num_hidden_layers"] * 4 > 5
    for name, gradient in mine.items():
        # Below a thousandth of the largest gradient, rounding of the sum is all there is (keys' biases).
        scale = max(theirs[name].abs().max().item(), 1e-3 * largest)
        assert distance(gradient, theirs[name], scale) < 1e-4, name


def test_tensors_come_back_bit_for_bit(case):
    _, folder, ours = case
    family = FAMILIES[folder.config["model_type"]]
    back = emptied(ours.state_dict(), family.parts(ours.config, folder.config["vocab_size"]))
    extra = set(folder.tensors) - set(back)
    assert all(folder.tensors[name].numel() == 0 for name in extra)
    assert extra == set(family.constants(ours.config))
    for name, tensor in back.items():
        assert torch.equal(tensor, folder.tensors[name]), name


def test_config_comes_back(case, tmp_path):
    public, folder, ours = case
    family = expressed_by(ours.config)
    assert not isinstance(family, list) and family.model_type == folder.config["model_type"]
    again = exported(ours, family, tmp_path / "back")
    tokens = random_tokens()
    with torch.no_grad():
        assert distance(again(tokens).logits, public(tokens).logits) < 1e-6
    # The same by way of config.json: not a key that matters is lost or another one.
    config = family.public_config(ours.config, folder.config["vocab_size"])
    assert model_of(config | {"max_position_embeddings": 64}, folder.tensors) == ours.config


def test_parts_cover_everything_once(case):
    _, folder, ours = case
    family = FAMILIES[folder.config["model_type"]]
    parts = family.parts(ours.config, folder.config["vocab_size"])
    state = ours.state_dict()
    assert set(parts) == set(state)
    theirs: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        marks = torch.zeros(state[name].shape, dtype=torch.int64)
        for part in pieces:
            marks[part.ours] += 1
            theirs.setdefault(part.name, torch.zeros(part.shape, dtype=torch.int64))[part.theirs] += 1
        assert (marks == 1).all(), name
    assert all((marks == 1).all() for marks in theirs.values())
    shapes = {name: tuple(tensor.shape) for name, tensor in folder.tensors.items()}
    constants = {name: shape for name, (shape, _) in family.constants(ours.config).items()}
    assert shapes == {name: tuple(marks.shape) for name, marks in theirs.items()} | constants


def test_pieces_of_experts_name_their_expert(case):
    _, folder, ours = case
    family = FAMILIES[folder.config["model_type"]]
    for name, pieces in family.parts(ours.config, folder.config["vocab_size"]).items():
        held = [part.expert for part in pieces]
        if "ffn.experts." in name:
            assert set(held) == set(range(ours.config.ffn.num_experts))
            assert all(f".experts.{part.expert}." in part.name or part.theirs[0] == part.expert for part in pieces)
        else:
            assert set(held) == {None}


def loss_of(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def gradients_on_disk(public: PreTrainedModel, path) -> dict[str, Tensor]:
    """The gradients under the names of tensors in a folder: saved as if they were the weights."""
    weights = {name: tensor.data for name, tensor in public.named_parameters()}
    for tensor in public.parameters():
        tensor.data = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    found = saved(public, path).tensors
    for name, tensor in public.named_parameters():
        tensor.data = weights[name]
    return found


def test_the_samples_tell_weights_apart():
    public = random_public(CASES["qwen2"])
    assert all(tensor.std() > 0 for tensor in public.parameters() if tensor.numel() > 1)
    assert all(tensor.isnan().all() for tensor in build(model_of(CASES["qwen2"])).parameters())
