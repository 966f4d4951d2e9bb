"""Attention of every kind, one position and one head at a time; sequences, which do not meet, side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """With the bias, if there is one."""
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def angle(pair: int, width: int, config) -> float:
    """By how much a pair turns from one position to the next."""
    plain = config.rope_theta ** (-2 * pair / width)
    yarn, llama3 = config.yarn, config.llama3
    if llama3 is not None:
        wavelength, length = 2 * math.pi / plain, llama3.original_length
        if wavelength < length / llama3.high_freq_factor:
            return plain
        if wavelength > length / llama3.low_freq_factor:
            return plain / llama3.factor
        kept = length / wavelength - llama3.low_freq_factor
        kept /= llama3.high_freq_factor - llama3.low_freq_factor
        return (1 - kept) * plain / llama3.factor + kept * plain
    if yarn is None:
        return plain

    def place_of(turns: float) -> float:
        """The pair i that turns so often over the original length: theta^(-2i/width) · length = 2π · turns."""
        return width / 2 * math.log(yarn.original_length / (turns * 2 * math.pi), config.rope_theta)

    first, last = place_of(yarn.beta_fast), place_of(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    assert first < last, "the cases stay away from where the ramp has no width"
    slow = 0.0 if pair <= first else 1.0 if pair >= last else (pair - first) / (last - first)
    return slow * plain / yarn.factor + (1 - slow) * plain


def grown(yarn, a: float) -> float:
    return 1 + a * math.log(yarn.factor) / 10


def turn(x_BW: Tensor, position: int | Tensor, config) -> Tensor:
    """Pair i is (i, i + W/2); each sequence may be at a position of its own."""
    width = x_BW.shape[1]
    size = grown(config.yarn, config.yarn.mscale) / grown(config.yarn, config.yarn.mscale_all_dim) if config.yarn else 1
    turned: list = [None] * width
    for i in range(width // 2):
        phi = torch.as_tensor(position * angle(i, width, config), dtype=torch.float64)
        a_B, b_B = x_BW[:, i], x_BW[:, i + width // 2]
        turned[i] = size * (a_B * phi.cos() - b_B * phi.sin())
        turned[i + width // 2] = size * (a_B * phi.sin() + b_B * phi.cos())
    return torch.stack(turned, dim=1)


def look(q_BW: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, sink: Tensor | None) -> Tensor:
    """One query at all that it sees; a sink takes its share and gives nothing."""
    scores_BJ = torch.stack([(q_BW * key_BW).sum(1) for key_BW in keys], dim=1) * scale
    shares_BJ = torch.exp(scores_BJ)
    total_B = shares_BJ.sum(1) if sink is None else shares_BJ.sum(1) + torch.exp(sink)
    return (shares_BJ.unsqueeze(2) * torch.stack(values, dim=1)).sum(1) / total_B.unsqueeze(1)


def heads_of(x_BN: Tensor, num: int) -> list[Tensor]:
    return list(x_BN.chunk(num, dim=1))


def grouped_query(model, w: dict[str, Tensor], layer: int, x_BSD: Tensor, places) -> Tensor:
    config = model.attention
    groups = config.kv_heads or model.heads
    width = config.head_dim or model.dim // model.heads
    window = config.window
    if config.full_every and (layer + 1) % config.full_every == 0:
        window = None

    def normed(x_BN: Tensor, num: int, name: str) -> list[Tensor]:
        if config.qk_norm == "full":
            x_BN = norm(x_BN, w[name], model.norm_eps)
        heads = heads_of(x_BN, num)
        return [norm(x, w[name], model.norm_eps) for x in heads] if config.qk_norm == "head" else heads

    def placed(x_BW: Tensor, position: int) -> Tensor:
        """Learned positions are in the tokens already."""
        return turn(x_BW, places[position], config) if model.positions == "rotary" else x_BW

    queries, keys, values = [], [], []
    for s, x_BD in enumerate(x_BSD.unbind(1)):
        q_BN, k_BN, v_BN = linear(x_BD, w, "qkv").split([model.heads * width, groups * width, groups * width], dim=1)
        queries.append([placed(q, s) for q in normed(q_BN, model.heads, "q_norm.weight")])
        keys.append([placed(k, s) for k in normed(k_BN, groups, "k_norm.weight")])
        values.append(heads_of(v_BN, groups))
    out = []
    for s in range(len(queries)):
        seen = range(s + 1 if window is None else min(window, s + 1))
        if not config.causal:
            seen = range(s, s - len(queries), -1)  # how far back: later ones, too
        parts = []
        for h in range(model.heads):
            g = h * groups // model.heads
            near = [(keys[s - back][g], values[s - back][g]) for back in seen]
            sink = w["sinks_H"][h] if config.sinks else None
            parts.append(look(queries[s][h], *map(list, zip(*near, strict=True)), 1 / math.sqrt(width), sink))
        out.append(linear(torch.cat(parts, dim=1), w, "out"))
    return torch.stack(out, dim=1)


def latent(model, w: dict[str, Tensor], x_BSD: Tensor, places) -> Tensor:
    config = model.attention
    nope, rope = config.nope_dim, config.rope_dim
    scale = 1 / math.sqrt(nope + rope)
    if config.yarn:
        scale *= grown(config.yarn, config.yarn.mscale_all_dim) ** 2
    keys: list = [[] for _ in range(model.heads)]
    values: list = [[] for _ in range(model.heads)]
    out = []
    for s, x_BD in enumerate(x_BSD.unbind(1)):
        if config.q_rank:
            q_BN = norm(x_BD @ w["q_down.weight"].t(), w["q_norm.weight"], 1e-6) @ w["q_up.weight"].t()
        else:
            q_BN = x_BD @ w["q.weight"].t()
        small_BN, shared_BW = (x_BD @ w["kv_down.weight"].t()).split([config.kv_rank, rope], dim=1)
        kv_BN = norm(small_BN, w["kv_norm.weight"], 1e-6) @ w["kv_up.weight"].t()
        parts = []
        for h, (q_BW, kv_BW) in enumerate(zip(heads_of(q_BN, model.heads), heads_of(kv_BN, model.heads), strict=True)):
            keys[h].append(torch.cat([kv_BW[:, :nope], turn(shared_BW, places[s], config)], dim=1))
            values[h].append(kv_BW[:, nope:])
            query_BW = torch.cat([q_BW[:, :nope], turn(q_BW[:, nope:], places[s], config)], dim=1)
            parts.append(look(query_BW, keys[h], values[h], scale, None))
        out.append(torch.cat(parts, dim=1) @ w["out.weight"].t())
    return torch.stack(out, dim=1)


def attention(model, w: dict[str, Tensor], layer: int, x_BSD: Tensor, places=None) -> Tensor:
    """One layer's attention, ``w`` being its own parameters; ``places``: position (or one per sequence) by column."""
    places = range(x_BSD.shape[1]) if places is None else places
    kind = model.attention.kind
    return latent(model, w, x_BSD, places) if kind == "mla" else grouped_query(model, w, layer, x_BSD, places)
