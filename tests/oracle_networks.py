"""Networks of two or three projections, the norms of blocks, and names of parameters, for the other parts."""

from __future__ import annotations

import math

import torch
from oracle_attention import norm
from oracle_routers import sigmoid
from torch import Tensor


def own(w: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parameters of a part of the model, by their names in it."""
    return {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}


def normed(model, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """After the model's kind of norm, whose parameters' names start with ``name``."""
    gain = w[f"{name}.weight"]
    if model.norm == "rms":
        return norm(x, gain, model.norm_eps)
    around = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (around * around).sum(-1, keepdim=True) / x.shape[-1]
    return around / (variance + model.norm_eps).sqrt() * gain + w[f"{name}.bias"]


def bell(x: Tensor) -> Tensor:
    """x·Φ(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def network(kind: str, x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | float = 0.0) -> Tensor:
    """Weights as [in, out]; of a gated kind the first half of the first one's columns is the gate."""
    h = x @ up + up_bias
    if kind == "relu":
        return (h * (h > 0)) @ down
    if kind == "gelu":
        return bell(h) @ down
    gate, up = h.chunk(2, dim=-1)
    if kind == "swiglu":
        return (gate * sigmoid(gate) * up) @ down
    if kind == "geglu":
        return (bell(gate) * up) @ down
    assert kind == "swiglu_clamped"
    gate = torch.where(gate > 7, 7.0, gate)
    up = torch.where(up > 7, 7.0, torch.where(up < -7, -7.0, up))
    return (gate * sigmoid(1.702 * gate) * (up + 1)) @ down
