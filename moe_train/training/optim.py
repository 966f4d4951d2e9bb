"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from moe_train.config.schema import OptimConfig
from moe_train.moe.roles import Kind, roles_of


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) with one group per role and decay; every parameter is in exactly one.

    Vectors (gains of norms, biases, sinks) are not decayed, nor are matrices whose role says so. A group's ``lr_ratio``
    multiplies the learning rate of each step.
    """
    roles = roles_of(model)
    groups: dict[tuple[Kind, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        role = roles[name]
        dims = parameter.dim() - int(role.kind is Kind.EXPERT)  # of one expert's
        groups.setdefault((role.kind, role.decays and dims > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "lr_ratio": config.router_lr_ratio if kind is Kind.ROUTER else 1.0,
                "name": f"{kind}",
            }
            for (kind, decayed), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,  # torch has a fused kernel for CPU, CUDA and XPU
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``steps``.

    Linear from lr / warmup_steps to lr, then half a cosine down to lr · min_lr_ratio at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)
