"""Measures what graph-coupled experts cost: speed over the number of experts, messages over neighbours, memory.

Usage: python scripts/graph_cost.py [--experts 2 4 8 16] [--wide 8 16] [--neighbors 4 2 1] [--tokens 1024] [--layers 2]
    [--repeats 9] [--precision fp32] [--device cpu] [--threads 1]

Forward and backward, one rank. Whatever stands in one table takes turns, so that a disturbance of the machine hits all
of it; ratios are medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from peak_memory import peak_bytes
from torch.nn import functional as F

from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.models.counts import count
from moe_train.models.initialise import initialise
from moe_train.models.sizes import coupling_size, network_size, times
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.graph.conv import GATHER_UP_TO
from moe_train.moe.graph.layer import GraphLayer
from moe_train.ops.messages import sum_chosen_messages, sum_messages

DIM, EXPERT_DIM, VOCABULARY, LENGTH = 256, 256, 4096, 256
"""Width of a token, hidden units of an expert (configs/model/graph_tiny.yaml), vocabulary, tokens per sequence."""
GRAPH = GraphConfig(prenorm=True)
"""That of graph_tiny."""
WARM_UP = 2
"""Rounds that do not count."""


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
        layers: blocks of a model.
        num_tokens: per step, a multiple of LENGTH.
        precision: fp32 or bf16.
        device: where it runs.
        repeats: rounds.
    """

    layers: int
    num_tokens: int
    precision: str
    device: torch.device
    repeats: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


@dataclass(frozen=True)
class Timed:
    """Something that is measured.

    Attributes:
        work: one forward and backward; gradients add up in buffers that stay, as in a training.
        times_ms: one per round.
    """

    work: Callable[[], None]
    times_ms: list[float] = field(default_factory=list)

    def over(self, other: Timed) -> float:
        """Return the median over the rounds of this time divided by the other's."""
        return float(np.median(np.array(self.times_ms) / np.array(other.times_ms)))

    @property
    def text(self) -> str:
        """Median and quartiles."""
        low, middle, high = np.percentile(self.times_ms, [25, 50, 75])
        return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def measure(timed: Sequence[Timed], setting: Setting) -> None:
    """Time everything in turn."""

    def wait() -> None:
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    for turn in range(-WARM_UP, setting.repeats):
        for one in timed:
            wait()
            start_s = time.perf_counter()
            one.work()
            wait()
            if turn >= 0:
                one.times_ms.append((time.perf_counter() - start_s) * 1e3)


def coupled(num_experts: int, layers: int, graph: GraphConfig = GRAPH) -> ModelConfig:
    """Return a model like graph_tiny."""
    ffn = FFNConfig(num_experts=num_experts, expert_dim=EXPERT_DIM, graph=graph)
    return ModelConfig(dim=DIM, layers=layers, ffn=ffn)


def training_flops(config: ModelConfig) -> float:
    """Return the FLOPs per token, forward and backward."""
    return count(config, VOCABULARY, LENGTH).training_flops_per_token


def dense_like(config: ModelConfig) -> ModelConfig:
    """Return the dense model whose FLOPs come nearest: they are linear in its hidden width."""

    def dense(hidden_dim: int) -> ModelConfig:
        return ModelConfig(dim=config.dim, layers=config.layers, ffn=FFNConfig(hidden_dim=hidden_dim))

    first, second = training_flops(dense(1)), training_flops(dense(2))
    return dense(max(1, 1 + round((training_flops(config) - first) / (second - first))))


def model_step(config: ModelConfig, setting: Setting) -> Timed:
    """Return forward, loss and backward of a model on random tokens."""
    exchange = LocalExchange(config.ffn.num_experts)
    model = build_model(config, VOCABULARY, exchange, setting.precision, setting.device)
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(VOCABULARY, (setting.num_tokens // LENGTH, LENGTH), generator=generator).to(setting.device)

    def work() -> None:
        logits_BSV = model(ids_BS).logits_BSV
        torch.autograd.backward(F.cross_entropy(logits_BSV.flatten(0, 1).float(), ids_BS.flatten()))

    return Timed(work)


def layer_step(num_experts: int, graph: GraphConfig, setting: Setting, layers: int = 1) -> Timed:
    """Return forward and backward of graph-coupled layers, one after the other with residual connections."""
    config = coupled(num_experts, layers, graph)
    exchange = LocalExchange(num_experts)
    model = build_model(config, VOCABULARY, exchange, setting.precision, setting.device)
    initialise(model, 0)
    found = [layer for layer in model.moe_layers.values() if isinstance(layer, GraphLayer)]
    shape = (setting.num_tokens // LENGTH, LENGTH, DIM)
    x_BSD = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device, setting.dtype)
    x_BSD.requires_grad_()
    grad_BSD = torch.ones_like(x_BSD)

    def work() -> None:
        y_BSD = x_BSD
        for layer in found:
            y_BSD = y_BSD + layer(y_BSD).y_BSD
        torch.autograd.backward(y_BSD, grad_BSD)

    return Timed(work)


def sum_steps(num_experts: int, num_sources: int, setting: Setting) -> tuple[Timed, Timed]:
    """Return forward and backward of the sums of messages alone: gathered sources, and one product with all experts."""
    generator = torch.Generator().manual_seed(0)
    h_TED = torch.randn(setting.num_tokens, num_experts, DIM, generator=generator).to(setting.device, setting.dtype)
    strength_TEE = torch.rand(setting.num_tokens, num_experts, num_experts, generator=generator).to(setting.device)
    ranked_EE = torch.rand(num_experts, num_experts, generator=generator).fill_diagonal_(-1.0)
    sources_EM = ranked_EE.topk(num_sources, dim=1).indices.to(setting.device)
    chosen_EE = torch.zeros_like(ranked_EE).scatter_(1, sources_EM.cpu(), 1.0).to(setting.device)
    strength_TEE = (strength_TEE * chosen_EE).requires_grad_()
    h_TED.requires_grad_()
    grad_TED = torch.ones_like(h_TED)
    return (
        Timed(lambda: torch.autograd.backward(sum_chosen_messages(strength_TEE, h_TED, sources_EM), grad_TED)),
        Timed(lambda: torch.autograd.backward(sum_messages(strength_TEE, h_TED), grad_TED)),
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    texts = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return "\n".join([texts[0], "|---" * len(headings) + "|", *texts[1:]])


def over_experts(experts: Sequence[int], setting: Setting) -> str:
    """Return the table of models with more and more experts beside dense ones of equal FLOPs."""
    configs = {e: coupled(e, setting.layers) for e in experts}
    graphs = {e: model_step(config, setting) for e, config in configs.items()}
    dense = {e: model_step(dense_like(config), setting) for e, config in configs.items()}
    measure([timed for e in experts for timed in (graphs[e], dense[e])], setting)
    first, rows = experts[0], []
    for e in experts:
        flops = training_flops(configs[e])
        by_flops = training_flops(configs[first]) / flops
        ratios = [graphs[first].over(graphs[e]), by_flops, first / e, dense[e].over(graphs[e])]
        rows.append([str(e), f"{flops / 1e6:.0f}", graphs[e].text, *(f"{ratio:.2f}" for ratio in ratios)])
    speed = f"tokens/s relative to E={first}"
    headings = ["E", "training MFLOPs per token", "step, ms (quartiles)", speed, "by FLOPs", "E-fold line"]
    return table([*headings, "tokens/s relative to dense of equal FLOPs"], rows)


def over_neighbors(experts: Sequence[int], neighbors: Sequence[int], setting: Setting) -> str:
    """Return the table of layers whose experts listen to all others, to some, to none."""
    sizes = [
        (e, m) for e in experts for m in (e - 1, *sorted((m for m in neighbors if 0 < m < e - 1), reverse=True), 0)
    ]
    layers = {(e, m): layer_step(e, GRAPH.model_copy(update={"max_neighbors": m}), setting) for e, m in sizes}
    sums = {(e, m): sum_steps(e, m, setting) for e, m in sizes if m}
    measure([*layers.values(), *(timed for pair in sums.values() for timed in pair)], setting)
    rows = []
    for e, m in sizes:
        silent, total = (layer_products(e, n) for n in (0, m))
        cells = [str(e), str(m), layers[e, m].text]
        cells += [f"{1 - 1 / layers[e, m].over(layers[e, 0]):.1%}", f"{1 - silent / total:.1%}"]
        if m:
            gathered, product = sums[e, m]
            cells += [gathered.text, product.text, f"{gathered.over(product):.2f}"]
        rows.append(cells if m else [*cells, "-", "-", "-"])
    headings = ["E", "sources", "layer, ms (quartiles)", "messages' share of its time", "of its FLOPs"]
    told = f"A layer gathers up to {GATHER_UP_TO} sources; with more, one product with all experts sums the messages."
    headings += ["sums gathered, ms", "sums by one product, ms", "gathered / product"]
    return f"{table(headings, rows)}\n\n{told}"


def layer_products(num_experts: int, max_neighbors: int) -> int:
    """Return the multiplications per token of experts, graph and pooling of one layer."""
    config = coupled(num_experts, 1, GRAPH.model_copy(update={"max_neighbors": max_neighbors}))
    assert config.ffn.graph is not None, "it was just set"
    experts = times(num_experts, network_size(DIM, EXPERT_DIM, config.ffn.activation))
    return (experts + coupling_size(config, config.ffn.graph)).multiplied


def over_memory(num_experts: int, setting: Setting) -> str:
    """Return the table of what bounds the E-fold activations of the graph-coupled layers of a model."""
    chunk = max(1, setting.num_tokens // 4)
    graphs = {
        "all kept": GRAPH,
        "`recompute`": GRAPH.model_copy(update={"recompute": True}),
        f"`recompute`, `chunk_tokens={chunk}`": GRAPH.model_copy(update={"recompute": True, "chunk_tokens": chunk}),
    }
    timed = {name: layer_step(num_experts, graph, setting, setting.layers) for name, graph in graphs.items()}
    measure(list(timed.values()), setting)
    peaks = {name: peak_bytes(one.work, setting.device) for name, one in timed.items()}
    first = next(iter(graphs))
    rows = [
        [name, f"{peaks[name] / 2**20:.1f}", f"{peaks[name] / peaks[first]:.2f}", f"{one.over(timed[first]):.2f}"]
        for name, one in timed.items()
    ]
    return table([f"E={num_experts}", "peak, MiB", "relative", "time, relative"], rows)


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description="What graph-coupled experts cost.")
    parser.add_argument("--experts", nargs="+", type=int, default=[2, 4, 8, 16], help="the first is the reference")
    parser.add_argument("--wide", nargs="+", type=int, default=[8, 16], help="experts of the table over neighbours")
    parser.add_argument("--neighbors", nargs="+", type=int, default=[4, 2, 1], help="sources beside all and none")
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {LENGTH}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = Setting(given.layers, given.tokens, given.precision, torch.device(given.device), given.repeats)
    where = f"{given.threads} thread(s)" if given.device == "cpu" else torch.cuda.get_device_name()
    print(f"{given.precision}, {given.tokens} tokens, {given.layers} layers, {where}\n")
    print(over_experts(given.experts, setting), flush=True)
    print(f"\n{over_neighbors(given.wide, given.neighbors, setting)}", flush=True)
    print(f"\n{over_memory(given.wide[0], setting)}")


if __name__ == "__main__":
    main()
