"""transformers' Mixtral as a whole training step: weights, gradients and torch's fused AdamW in one format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_train.benchmark.model_case import LEARNING_RATE, ModelCase, draw_tokens
from moe_train.benchmark.timing import Here, Timed
from moe_train.config.schema import OptimConfig, TrainSection

NEEDS: Final = ("transformers",)
_PURE: Final = (
    "weights, gradients and moments in the activations' format: less work than fp32 masters; attention by SDPA"
)
ABOUT: Final = {"eager": f"a loop over experts; {_PURE}", "grouped_mm": f"torch's grouped product; {_PURE}"}


def build(arguments: dict[str, Any]) -> dict[str, Timed | float]:
    """Build model and optimizer.

    Args:
        arguments: ``case``, and ``experts``: how experts are computed.
    """
    case = ModelCase.parse(arguments["case"])
    model = mixtral(case, arguments["experts"])
    name = f"transformers_{arguments['experts']}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    step = training_step(case, model)
    return {name: Here(step), f"{name}:first loss": float(step()), f"{name}:parameters": float(parameters)}


def mixtral(case: ModelCase, experts: str) -> nn.Module:
    """Return Mixtral in the sizes of a case, with values of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(case.seed)
    settings: dict[str, Any] = {
        "vocab_size": case.vocab_size,
        "hidden_size": case.dim,
        "intermediate_size": case.expert_dim,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads,
        "num_local_experts": case.experts,
        "num_experts_per_tok": case.top_k,
        "max_position_embeddings": case.seq_len,
        "tie_word_embeddings": case.model().tie_embeddings,
        "use_cache": False,
        "attn_implementation": "sdpa",
        "experts_implementation": experts,
    }
    model: nn.Module = MixtralForCausalLM(MixtralConfig(**settings))
    model.to(dtype=case.dtype)
    return model.train()


def training_step(case: ModelCase, model: nn.Module) -> Callable[[], Tensor]:
    """Return a training step: forward, loss, backward, gradient norm, optimizer."""
    tokens_BS, _ = draw_tokens(case)
    clip_norm, settings = TrainSection().clip_norm, OptimConfig()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, settings.betas, settings.eps, settings.weight_decay, fused=True
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=tokens_BS, labels=tokens_BS).loss
        torch.autograd.backward(loss)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        return loss.detach()

    return step
