"""The slow, obvious truth: the whole model on the whole global batch in one process, token by token, expert by expert.

It shares only parameter values and the configuration with the product: no router, random number, capacity plan,
exchange, permutation, grouped product, balance sum, gradient buffer, fused optimizer or loss of its own. Its parts are
`oracle_tokens`, `oracle_routers`, `oracle_capacity` and `oracle_balance`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import oracle_balance as balance
import torch
from oracle_capacity import Placed, place_assignments
from oracle_routers import Decision, Router, route
from oracle_tokens import Token, derived
from torch import Tensor

from moe_train.config.schema import TrainConfig
from moe_train.models.transformer import Transformer, is_moe_layer

IGNORE = -100


@dataclass
class Truth:
    """Figures of a few optimizer steps.

    Attributes:
        figures: per step, what a record of the step says.
        norms: per step, the gradient norm before clipping.
        gradients: of the last step, clipped.
        weights: after the last step.
        biases: of the routers after the last step, by name.
    """

    figures: list[dict[str, object]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """How a global batch is cut into runs of sequences, which only rules that count over a pass or a rank see.

    Attributes:
        passes: micro-batches; each is one forward pass over all ranks.
        ranks: parts of a pass.
    """

    passes: int = 1
    ranks: int = 1


@dataclass
class Layer:
    """What happened in one MoE layer."""

    tokens: list[Token]
    decisions: list[Decision]
    placed: Placed


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def attention(config, x_SD: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    width = config.dim // config.heads
    groups = config.attention.kv_heads or config.heads
    length = x_SD.shape[0]
    half = width // 2
    queries, keys, values = [], [], []
    for position, row_HW in enumerate((x_SD @ qkv.t()).view(length, -1, width).unbind()):
        angles = [position * config.attention.rope_theta ** (-2 * (i % half) / width) for i in range(width)]
        cos_W, sin_W = (torch.tensor([f(a) for a in angles], dtype=x_SD.dtype) for f in (math.cos, math.sin))
        turned_HW = row_HW * cos_W + torch.cat([-row_HW[:, half:], row_HW[:, :half]], dim=1) * sin_W
        queries.append(turned_HW[: config.heads].unbind())
        keys.append(turned_HW[config.heads : config.heads + groups].unbind())
        values.append(row_HW[config.heads + groups :].unbind())
    rows = []
    for s in range(length):
        parts = []
        for h in range(config.heads):
            g = h // (config.heads // groups)
            scores = torch.stack([keys[j][g] for j in range(s + 1)]) @ queries[s][h] / math.sqrt(width)
            parts.append(scores.softmax(0) @ torch.stack([values[j][g] for j in range(s + 1)]))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ out.t()


def swiglu(x_D: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weights as [in, out]."""
    gate, up = (x_D @ gate_up).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ down


@dataclass
class Batch:
    """One global batch of one step."""

    ids_BS: Tensor
    labels_BS: Tensor
    split: Split
    seed: int

    def is_valid(self, sequence: int, position: int) -> bool:
        return self.labels_BS[sequence, position].item() != IGNORE

    def token(self, x_D: Tensor, sequence: int, position: int, depth: int) -> Token:
        size, length = self.ids_BS.shape
        number = sequence * self.split.passes // size
        part = sequence * self.split.passes * self.split.ranks // size
        groups = {"step": 0, "pass": number, "rank": part, "sequence": sequence}
        seed = derived(self.seed, depth)
        return Token(x_D, self.ids_BS[sequence, position].item(), sequence, position, length, groups, seed)


def moe(ffn, w: dict[str, Tensor], bias: list[float] | None, prefix: str, x_BSD: Tensor, batch: Batch, depth: int):
    """All sequences through one MoE layer: its output and what happened."""
    places = [(b, s) for b in range(x_BSD.shape[0]) for s in range(x_BSD.shape[1])]
    x = dict(zip(places, x_BSD.flatten(0, 1).unbind(), strict=True))
    tokens = [batch.token(x[place], *place, depth) for place in places if batch.is_valid(*place)]
    start = f"{prefix}.router."
    own = {name.removeprefix(start): value for name, value in w.items() if name.startswith(start)}
    decisions = route(Router(ffn.router, ffn.num_experts, ffn.top_k, own, bias), tokens)
    placed = place_assignments(ffn.capacity, ffn.num_experts, ffn.top_k, tokens, decisions)
    ups, downs = (w[f"{prefix}.experts.{name}"].unbind() for name in ("gate_up_LDF2", "down_LFD"))
    y = {place: torch.zeros_like(x_D) for place, x_D in x.items()}
    for token, outputs in zip(tokens, placed.outputs, strict=True):
        for e, weight in outputs:
            y[token.sequence, token.position] += weight * swiglu(token.x_D, ups[e], downs[e])
    y_BSD = torch.stack(list(y.values())).view_as(x_BSD)
    if f"{prefix}.shared.down.weight" in w:
        up, down = w[f"{prefix}.shared.gate_up.weight"], w[f"{prefix}.shared.down.weight"]
        y_BSD = y_BSD + swiglu(x_BSD, up.t(), down.t())
    return y_BSD, Layer(tokens, decisions, placed)


def forward(config, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Batch):
    """Logits of the whole batch, and the MoE layers by depth."""
    model, ffn = config.model, config.model.ffn
    x = w["embedding_VD"][batch.ids_BS]
    layers: dict[int, Layer] = {}
    for depth in range(model.layers):
        b = f"blocks.{depth}"
        normed = norm(x, w[f"{b}.attention_norm.weight"], model.norm_eps)
        qkv, out = w[f"{b}.attention.qkv.weight"], w[f"{b}.attention.out.weight"]
        x = x + torch.stack([attention(model, x_SD, qkv, out) for x_SD in normed])
        normed = norm(x, w[f"{b}.ffn_norm.weight"], model.norm_eps)
        if is_moe_layer(ffn, depth):
            bias = biases.get(f"{b}.ffn.router.bias_E")
            y, layers[depth] = moe(ffn, w, bias, f"{b}.ffn", normed, batch, depth)
        else:
            y = swiglu(normed, w[f"{b}.ffn.gate_up.weight"].t(), w[f"{b}.ffn.down.weight"].t())
        x = x + y
    return norm(x, w["norm.weight"], model.norm_eps) @ w.get("head.weight", w["embedding_VD"]).t(), layers


def objective(config, w: dict[str, Tensor], biases: dict[str, list[float]], batch: Batch):
    """The whole objective, the figures of the step, and the MoE layers."""
    ffn = config.model.ffn
    logits_BSV, layers = forward(config, w, biases, batch)
    loss, number = torch.zeros((), dtype=logits_BSV.dtype), 0
    for logits_V, label in zip(logits_BSV.flatten(0, 1).unbind(), batch.labels_BS.flatten().tolist(), strict=True):
        if label != IGNORE:
            loss = loss + logits_V.logsumexp(0) - logits_V[label]
            number += 1
    total = loss = loss / number
    figures: dict[str, object] = {"loss": loss.item()}
    for depth, layer in layers.items():
        for name, (coefficient, value) in balance.losses(ffn, layer.tokens, layer.decisions).items():
            total = total + coefficient * value
            figures[name] = figures.get(name, 0.0) + value.item() / len(layers)
        for name, value in balance.layer_figures(ffn.num_experts, layer.decisions, layer.placed).items():
            figures[f"moe/layer_{depth:02d}/{name}"] = value
    return total, figures, layers


def train(
    config: TrainConfig,
    model: Transformer,
    batches: list[tuple[Tensor, Tensor]],
    rates: list[float],
    split: Split = Split(),
) -> Truth:
    """Train the parameter values of ``model`` (which holds all experts) for some steps of plain AdamW."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    biases = {name: b.tolist() for name, b in model.named_buffers() if name.endswith("bias_E")}
    first, second = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    truth = Truth()
    beta1, beta2 = config.optim.betas
    for step, ((ids_BS, labels_BS), rate) in enumerate(zip(batches, rates, strict=True)):
        batch = Batch(ids_BS, labels_BS, split, derived(config.run.seed, step))
        total, figures, layers = objective(config, w, biases, batch)
        gradients = dict(zip(w, torch.autograd.grad(total, list(w.values()), allow_unused=True), strict=True))
        gradients = {n: torch.zeros_like(w[n]) if g is None else g for n, g in gradients.items()}
        size = math.sqrt(sum(g.pow(2).sum().item() for g in gradients.values()))
        scale = 1.0 if config.train.clip_norm is None else min(1.0, config.train.clip_norm / (size + 1e-6))
        truth.gradients = {n: g * scale for n, g in gradients.items()}
        with torch.no_grad():
            for n, p in w.items():
                g = truth.gradients[n]
                decay = config.optim.weight_decay if p.dim() > 1 else 0.0
                first[n] = beta1 * first[n] + (1 - beta1) * g
                second[n] = beta2 * second[n] + (1 - beta2) * g * g
                p -= rate * decay * p
                step_size = rate / (1 - beta1 ** (step + 1))
                p -= step_size * first[n] / ((second[n] / (1 - beta2 ** (step + 1))).sqrt() + config.optim.eps)
        for depth, layer in layers.items():
            name = f"blocks.{depth}.ffn.router.bias_E"
            if name in biases:
                biases[name] = balance.moved_bias(config.model.ffn.balance.loss_free, biases[name], layer.decisions)
                figures[f"moe/layer_{depth:02d}/bias_range"] = max(biases[name]) - min(biases[name])
        truth.figures.append(figures)
        truth.norms.append(size)
    truth.weights = {n: p.detach() for n, p in w.items()}
    truth.biases = {n: torch.tensor(b, dtype=torch.float64) for n, b in biases.items()}
    return truth
