"""Times single pieces of a training step, each in its possible forms, in turn: the figures of docs/performance.md.

Usage: python scripts/piece_cost.py [attention blocks loss norm gradients rows] [--rounds 9] [--threads 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.benchmark.timing import Here, Timed, interleave
from moe_train.config.attention import RotaryConfig
from moe_train.config.model import Compute as HowExperts
from moe_train.moe.modules import RMSNorm
from moe_train.ops.activation import activate
from moe_train.ops.attention import Compute, causal_attention
from moe_train.ops.expert_ffn import Networks, compute, expert_ffn
from moe_train.ops.linear_loss import linear_cross_entropy_sum
from moe_train.ops.loss import cross_entropy_sum
from moe_train.ops.pointwise import fused
from moe_train.ops.rotary import rotary_table, rotate
from moe_train.parallel.gradients import ROW, squared_norm

TOKENS, DIM, VOCABULARY, WARM_UP = 4096, 512, 8192, 2
SHAPES = ((8, 2, 1024), (64, 6, 192), (128, 8, 128))
"""Experts E, choices K per token, hidden width F."""
Piece = tuple[str, Mapping[str, Timed]]
"""What is timed, and its forms; speeds are relative to the first."""


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random numbers that want a gradient."""
    return torch.randn(*shape).mul_(0.02 if len(shape) == 3 else 1.0).to(dtype).requires_grad_()


def both_ways(compute_it: Callable[[], Tensor], leaves: list[Tensor]) -> Here:
    """Return a forward and a backward pass; the gradient of the result is made before."""
    upstream = torch.randn_like(compute_it())
    return Here(lambda: torch.autograd.grad(compute_it(), leaves, upstream))


def attend(heads: Sequence[Tensor], window: int | None, way: Compute) -> Tensor:
    """Attend with queries, keys and values [B, S, H, W]."""
    q, k, v = (t.transpose(1, 2) for t in heads)
    return causal_attention(q, k, v, window=window, compute=way)


def attention() -> Iterator[Piece]:
    """Fused attention against products, by length, at equal tokens; heads of 64."""
    for dtype, (length, window) in product(
        (torch.bfloat16, torch.float32),
        ((128, None), (256, None), (512, None), (1024, None), (2048, None), (2048, 256)),
    ):
        q, k, v = (leaf(TOKENS // length, length, 8, 64, dtype=dtype) for _ in range(3))
        seen = f"{length} positions" if window is None else f"{length} positions, window {window}"

        ways = {way: both_ways(partial(attend, (q, k, v), window, way), [q, k, v]) for way in ("fused", "products")}
        yield f"attention, {str(dtype)[6:]}, {seen}", ways


def run_experts(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, networks: Networks, rows: int, way: HowExperts
) -> Tensor:
    """Compute the experts with blocks of so many rows."""
    compute.BLOCK_ROWS = rows
    return expert_ffn(x_TD, experts_TK, weights_TK, experts_TK.numel(), networks, way)


def blocks() -> Iterator[Piece]:
    """Experts with so many rows between gather and sum at one time, and all in one batched product."""
    for (experts, top_k, width), skewed in product(SHAPES, (False, True)):
        x_TD, weights_TK = leaf(TOKENS, DIM), torch.rand(TOKENS, top_k).requires_grad_()
        logits_TE = torch.randn(TOKENS, experts) - (torch.arange(1, experts + 1).log() if skewed else 0.0)
        experts_TK = logits_TE.topk(top_k).indices
        up, down = leaf(experts, DIM, 2 * width, dtype=torch.float32), leaf(experts, width, DIM, dtype=torch.float32)
        networks = Networks(up, down, None, None, "swiglu")
        forms: dict[str, tuple[int, HowExperts]] = {
            "8192 rows": (8192, "loop"), "one expert": (1, "loop"), "512 rows": (512, "loop"),
            "2048 rows": (2048, "loop"), "all rows": (10**9, "loop"), "bmm": (8192, "bmm"),
        }  # fmt: skip
        kept = forms if not skewed else {name: form for name, form in forms.items() if "bmm" not in name}
        leaves = [x_TD, weights_TK, up, down]
        timed = {
            name: both_ways(partial(run_experts, x_TD, experts_TK, weights_TK, networks, *form), leaves)
            for name, form in kept.items()
        }
        yield f"experts, E={experts} K={top_k} F={width}, {'zipf' if skewed else 'balanced'}", timed


def loss() -> Iterator[Piece]:
    """Head and cross-entropy: plain, and with the gradients made in the forward pass, whole and in chunks."""
    x_TD, head_VD = leaf(TOKENS, DIM), leaf(VOCABULARY, DIM, dtype=torch.float32)
    labels_T = torch.randint(VOCABULARY, (TOKENS,))
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: cross_entropy_sum(F.linear(x_TD, head_VD.to(x_TD.dtype)), labels_T)
    }
    for chunk in (None, 1024, 512):
        name = "one chunk" if chunk is None else f"chunks of {chunk}"
        ways[name] = partial(linear_cross_entropy_sum, x_TD, head_VD, None, labels_T, chunk)
    yield "head and loss, bf16", {name: both_ways(way, [x_TD, head_VD]) for name, way in ways.items()}


def norm() -> Iterator[Piece]:
    """What torch.compile fuses: norm, rotation, SwiGLU."""
    x_BSD, q_BSHW, h_TF = leaf(8, 512, DIM), leaf(8, 512, 8, 64), leaf(TOKENS, 4096)
    layer, rotary = RMSNorm(DIM, 1e-5), rotary_table(512, 64, RotaryConfig(), torch.float32, torch.device("cpu"))
    torch.nn.init.ones_(layer.weight)
    pieces: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "RMSNorm": (lambda: layer(x_BSD), x_BSD),
        "rotation": (lambda: rotate(q_BSHW.transpose(1, 2), rotary), q_BSHW),
        "SwiGLU": (lambda: activate(h_TF, "swiglu"), h_TF),
    }

    def under(backend: str | None, timed: Here) -> Here:
        def work() -> object:
            with fused(backend):
                return timed.work()

        return Here(work)

    for name, (piece, wanted) in pieces.items():
        timed = both_ways(piece, [wanted])
        yield f"{name}, bf16", {"eager": under(None, timed), "compiled": under("inductor", timed)}


def gradients() -> Iterator[Piece]:
    """What happens to 24 million gradients between backward pass and update."""
    gradient, other = torch.randn(24_000_000), torch.randn(24_000_000)
    weight = torch.nn.Parameter(torch.randn(24_000_000))
    weight.grad = gradient
    optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
    yield (
        "24 M fp32 gradients",
        {
            "fused AdamW": Here(optimizer.step),
            "set to zero": Here(other.zero_),
            "added": Here(lambda: other.add_(gradient)),
            "copied": Here(lambda: other.copy_(gradient)),
            "scaled": Here(lambda: other.mul_(0.999)),
            "norm in fp64": Here(lambda: torch.linalg.vector_norm(gradient, dtype=torch.float64)),
            f"norm by rows of {ROW}": Here(lambda: squared_norm(gradient)),
        },
    )


def rows() -> Iterator[Piece]:
    """Products of bf16 rows, so many that a kernel is built, and numbers that recur: eight experts of 1024."""
    weight_DF, out_NF = torch.randn(DIM, 2048).bfloat16(), torch.empty(TOKENS * 2, 2048, dtype=torch.bfloat16)
    x_ND, generator = torch.randn(TOKENS * 2, DIM).bfloat16(), torch.Generator().manual_seed(0)

    def loop(step: int) -> None:
        for _ in range(8):
            drawn = int(torch.randint(700, 1024, (), generator=generator))
            size = -(-drawn // step) * step
            torch.mm(x_ND[:size], weight_DF, out=out_NF[:size])

    yield "products of 700 to 1024 rows", {f"multiples of {n}": Here(partial(loop, n)) for n in (64, 32, 16, 1)}


PIECES: dict[str, Callable[[], Iterator[Piece]]] = {
    "attention": attention, "blocks": blocks, "loss": loss, "norm": norm, "gradients": gradients, "rows": rows,
}  # fmt: skip


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="What single pieces of a step cost.")
    parser.add_argument("pieces", nargs="*", choices=[*PIECES, []], default=list(PIECES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print("| piece | form | median, ms | speed relative to the first |\n|---|---|---|---|", flush=True)
    for name in given.pieces:
        for about, forms in PIECES[name]():
            times = interleave(forms, given.rounds, WARM_UP)
            first = next(iter(times.values()))
            for form, measured in times.items():
                print(f"| {about} | {form} | {measured.median_ms:.1f} | {measured.ratio_to(first)} |", flush=True)


if __name__ == "__main__":
    main()
