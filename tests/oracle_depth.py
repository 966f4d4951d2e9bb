"""Blocks that only some tokens pass: the best of each sequence by a sort in Python, one sequence after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from oracle_networks import own
from torch import Tensor


@dataclass
class DepthLayer:
    """What happened in the choice of one block, for each valid token: its logit, and three yes or no."""

    name: str
    coef: float
    logits: list[Tensor] = field(default_factory=list)
    best: list[bool] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.logits)

    def losses(self, ffn) -> dict[str, tuple[float, Tensor]]:
        """-log of the probability that the truth was given."""
        total = torch.zeros((), dtype=torch.float64)
        for logit, is_best in zip(self.logits, self.best, strict=True):
            total = total + torch.log(1 + torch.exp(-logit if is_best else logit))
        return {"depth_loss": (self.coef, total / self.num_tokens)}

    def figures(self, ffn) -> dict[str, object]:
        willing = [logit.item() > 0 for logit in self.logits]
        right = sum(a == b for a, b in zip(willing, self.best, strict=True))
        counts = {"chosen_share": sum(self.best), "causal_share": sum(willing), "causal_accuracy": right}
        return {name: count / self.num_tokens for name, count in counts.items()}

    def figures_after_step(self, ffn, w: dict[str, Tensor]) -> dict[str, object]:
        return {}


@dataclass
class Some:
    """A batch of which each sequence has some tokens left, at their places; the others only fill up.

    Attributes:
        whole: the batch.
        rows: per sequence the positions of its tokens.
        meant: per sequence, how many of them are taken.
    """

    whole: object
    rows: list[list[int]]
    meant: list[int]

    @property
    def places(self) -> list[Tensor]:
        """Positions [B] by column."""
        return list(torch.tensor(self.rows, dtype=torch.float64).unbind(1))

    def is_valid(self, sequence: int, column: int) -> bool:
        return column < self.meant[sequence]

    def valid(self, later: int) -> Tensor:
        assert later == 0, "the blocks of modules that look ahead take all tokens"
        return torch.tensor([[c < meant for c in range(len(self.rows[0]))] for meant in self.meant])

    def token(self, x_D: Tensor, sequence: int, column: int, depth: int, later: int):
        return self.whole.token(x_D, sequence, self.rows[sequence][column], depth, later)


def is_deep(model, depth: int) -> bool:
    """Whether only some tokens pass a block."""
    return model.depth.kind != "full" and depth < model.layers and depth % model.depth.every == model.depth.every - 1


def logit_of(model, w: dict[str, Tensor], x_D: Tensor, score: Tensor) -> Tensor:
    """Positive for a token that would be taken by itself."""
    if model.depth.causal == "classifier":
        return score
    hidden_N = w["hidden.weight"] @ x_D.detach() + w["hidden.bias"]
    return ((hidden_N * (hidden_N > 0)) * w["verdict.weight"][0]).sum() + w["verdict.bias"][0]


def deep_block(model, w: dict[str, Tensor], name: str, x_BSD: Tensor, batch, plain: Callable):
    """One block for the best tokens of each sequence, and what happened in the choice.

    ``plain(x_BCD, batch)`` is the block around which this one stands: its output and what happened in it.
    """
    router_w, length = own(w, f"{name}.router"), x_BSD.shape[1]
    count = math.ceil(Fraction(str(model.depth.capacity)) * length)
    layer = DepthLayer(name, model.depth.causal_coef)
    rows, meant, scores = [], [], []
    for b, x_SD in enumerate(x_BSD):
        scores.append([(x_D * router_w["weight_D"]).sum() for x_D in x_SD])
        valid = [s for s in range(length) if batch.is_valid(b, s)]
        ranked = sorted(valid, key=lambda s, own=scores[b]: (-own[s].detach().float().item(), s))
        taken = sorted(ranked[:count])
        rows.append((taken + [s for s in range(length) if s not in taken])[:count])
        meant.append(len(taken))
        layer.logits += [logit_of(model, router_w, x_SD[s], scores[b][s]) for s in valid]
        layer.best += [s in taken for s in valid]
    some = Some(batch, rows, meant)
    x_BCD = torch.stack([x_SD[own_rows] for x_SD, own_rows in zip(x_BSD, rows, strict=True)])
    y_BCD, layers = plain(x_BCD, some)
    out = [list(x_SD.unbind()) for x_SD in x_BSD]
    for b, own_rows in enumerate(rows):
        for c, s in enumerate(own_rows[: meant[b]]):
            r = scores[b][s]
            gate = r if model.depth.weight == "linear" else 1 / (1 + torch.exp(-r))
            out[b][s] = x_BSD[b, s] + gate * (y_BCD[b, c] - x_BCD[b, c])
    return torch.stack([torch.stack(x_SD) for x_SD in out]), layer, layers
