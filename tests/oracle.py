"""The slow, obvious truth: the whole model on the whole global batch in one process, token by token, expert by expert.

It shares only parameter values with the product: no router, capacity plan, exchange, permutation, grouped product,
gradient buffer, fused optimizer or loss of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.schema import FactorCapacityConfig, TrainConfig
from moe_train.models.transformer import Transformer, is_moe_layer

IGNORE = -100


@dataclass
class Truth:
    """Figures of a few optimizer steps."""

    losses: list[float]
    aux: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def attention(config, x_SD: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    width = config.dim // config.heads
    groups = config.attention.kv_heads or config.heads
    length = x_SD.shape[0]
    heads = (x_SD @ qkv.t()).view(length, -1, width)

    def turned(v_W: Tensor, position: int) -> Tensor:
        half = width // 2
        parts = []
        for i in range(width):
            angle = position * config.attention.rope_theta ** (-2 * (i % half) / width)
            other = -v_W[i + half] if i < half else v_W[i - half]
            parts.append(v_W[i] * math.cos(angle) + other * math.sin(angle))
        return torch.stack(parts)

    rows = []
    for s in range(length):
        parts = []
        for h in range(config.heads):
            g = h // (config.heads // groups)
            q = turned(heads[s, h], s)
            keys = torch.stack([turned(heads[j, config.heads + g], j) for j in range(s + 1)])
            values = torch.stack([heads[j, config.heads + groups + g] for j in range(s + 1)])
            parts.append((keys @ q / math.sqrt(width)).softmax(0) @ values)
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ out.t()


def swiglu(x_D: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weights as [in, out]."""
    hidden = gate_up.shape[1] // 2
    gate = x_D @ gate_up[:, :hidden]
    return (gate * torch.sigmoid(gate) * (x_D @ gate_up[:, hidden:])) @ down


def moe(config, w: dict[str, Tensor], prefix: str, x_SD: Tensor, valid: list[bool], sums: dict) -> Tensor:
    """One sequence through one MoE layer; adds its router's sums to ``sums``."""
    ffn = config.ffn
    limit = None
    if isinstance(ffn.capacity, FactorCapacityConfig):
        limit = max(1, math.ceil(ffn.capacity.factor * len(valid) * ffn.top_k / ffn.num_experts))
    taken = [0] * ffn.num_experts
    counts = torch.zeros(ffn.num_experts, dtype=x_SD.dtype)
    probability_sum = torch.zeros(ffn.num_experts, dtype=x_SD.dtype)
    rows = []
    for x_D, is_valid in zip(x_SD, valid, strict=True):
        y_D = torch.zeros_like(x_D)
        if is_valid:
            logits = w[f"{prefix}.router.weight"] @ x_D
            p = logits.softmax(0)
            ranked = sorted((-logit, e) for e, logit in enumerate(logits.tolist()))
            chosen = [e for _, e in ranked[: ffn.top_k]]
            total = sum(p[e] for e in chosen) if ffn.router.normalize == "selected" else 1.0
            probability_sum = probability_sum + p
            sums["z"] = sums["z"] + logits.logsumexp(0) ** 2
            for e in chosen:
                counts[e] += 1
                taken[e] += 1
                if limit is None or taken[e] <= limit:
                    expert = swiglu(x_D, w[f"{prefix}.experts.gate_up_LDF2"][e], w[f"{prefix}.experts.down_LFD"][e])
                    y_D = y_D + ffn.router.scale * p[e] / total * expert
        if f"{prefix}.shared.down.weight" in w:
            up, down = w[f"{prefix}.shared.gate_up.weight"], w[f"{prefix}.shared.down.weight"]
            y_D = y_D + swiglu(x_D, up.t(), down.t())
        rows.append(y_D)
    sums["counts"] = sums["counts"] + counts
    sums["p"] = sums["p"] + probability_sum
    if counts.sum() > 0:
        tokens = counts.sum() / ffn.top_k
        sums["sequence"] = sums["sequence"] + tokens * ffn.num_experts * sum(
            counts[e] / counts.sum() * probability_sum[e] / tokens for e in range(ffn.num_experts)
        )
    return torch.stack(rows)


def objective(config: TrainConfig, w: dict[str, Tensor], tokens_BS: Tensor, labels_BS: Tensor):
    """Return cross-entropy per token, mean unweighted aux loss, and the whole objective."""
    model, ffn = config.model, config.model.ffn
    number = int((labels_BS != IGNORE).sum())
    layers = [
        {"counts": 0, "p": 0, "z": 0, "sequence": 0} if is_moe_layer(ffn, layer) else None
        for layer in range(model.layers)
    ]
    loss = torch.zeros((), dtype=w["embedding_VD"].dtype)
    for tokens_S, labels_S in zip(tokens_BS, labels_BS, strict=True):
        valid = [label != IGNORE for label in labels_S.tolist()]
        x = w["embedding_VD"][tokens_S]
        for layer in range(model.layers):
            b = f"blocks.{layer}"
            normed = norm(x, w[f"{b}.attention_norm.weight"], model.norm_eps)
            x = x + attention(model, normed, w[f"{b}.attention.qkv.weight"], w[f"{b}.attention.out.weight"])
            normed = norm(x, w[f"{b}.ffn_norm.weight"], model.norm_eps)
            if layers[layer] is not None:
                x = x + moe(model, w, f"{b}.ffn", normed, valid, layers[layer])
            else:
                up, down = w[f"{b}.ffn.gate_up.weight"], w[f"{b}.ffn.down.weight"]
                x = x + torch.stack([swiglu(x_D, up.t(), down.t()) for x_D in normed])
        logits = norm(x, w["norm.weight"], model.norm_eps) @ w.get("head.weight", w["embedding_VD"]).t()
        for logits_V, label in zip(logits, labels_S.tolist(), strict=True):
            if label != IGNORE:
                loss = loss + logits_V.logsumexp(0) - logits_V[label]
    total, aux = loss, []
    for sums in layers:
        if sums is None:
            continue
        share = (sums["counts"] / sums["counts"].sum()).detach()
        balance = ffn.num_experts * sum(share[e] * sums["p"][e] for e in range(ffn.num_experts))
        if ffn.balance.aux is not None:
            if ffn.balance.aux.scope == "sequence":
                balance = sums["sequence"]
            total = total + ffn.balance.aux.coef * balance
        aux.append(float(balance.detach()) / number)
        if ffn.balance.z_loss is not None:
            total = total + ffn.balance.z_loss.coef * sums["z"]
    return loss / number, sum(aux) / max(1, len(aux)), total / number


def train(config: TrainConfig, model: Transformer, batches: list[tuple[Tensor, Tensor]], rates: list[float]) -> Truth:
    """Train the parameter values of ``model`` (which holds all experts) for some steps of plain AdamW."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    first, second = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    truth = Truth([], [], [], {}, {})
    beta1, beta2 = config.optim.betas
    for step, ((tokens_BS, labels_BS), rate) in enumerate(zip(batches, rates, strict=True), start=1):
        loss, aux, total = objective(config, w, tokens_BS, labels_BS)
        gradients = dict(zip(w, torch.autograd.grad(total, list(w.values()), allow_unused=True), strict=True))
        gradients = {n: torch.zeros_like(w[n]) if g is None else g for n, g in gradients.items()}
        size = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
        scale = 1.0 if config.train.clip_norm is None else min(1.0, config.train.clip_norm / (size + 1e-6))
        truth.losses.append(float(loss.detach()))
        truth.aux.append(aux)
        truth.norms.append(size)
        truth.gradients = {n: g * scale for n, g in gradients.items()}
        with torch.no_grad():
            for n, p in w.items():
                g = truth.gradients[n]
                decay = config.optim.weight_decay if p.dim() > 1 else 0.0
                first[n] = beta1 * first[n] + (1 - beta1) * g
                second[n] = beta2 * second[n] + (1 - beta2) * g * g
                p -= rate * decay * p
                p -= rate * (first[n] / (1 - beta1**step)) / ((second[n] / (1 - beta2**step)).sqrt() + config.optim.eps)
    truth.weights = {n: p.detach() for n, p in w.items()}
    return truth
