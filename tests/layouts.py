"""Runs the product's training step in any layout on a given list of global batches, and gathers what it did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from oracle import IGNORE, Truth
from torch import Tensor

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.data.loader import Batch
from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange, exchange_for
from moe_train.moe.roles import Kind, roles_of
from moe_train.parallel.engine import TorchEngine
from moe_train.training.optim import build_optimizer
from moe_train.training.step import train_step

VOCAB, LENGTH, BATCH, STEPS = 23, 6, 16, 3
RATES = [1e-2, 2e-2, 1e-2]
SMALL = [
    "model.dim=8", "model.layers=2", "model.heads=2", "model.attention.kv_heads=1", "model.init_std=0.3",
    "model.ffn.num_experts=4", "model.ffn.expert_dim=6", "model.ffn.hidden_dim=10", "train.clip_norm=0.5",
    "model.ffn.balance.aux.coef=0.1", "model.ffn.balance.z_loss.coef=0.01",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model and batch; ``layout`` says how it is run."""

    name: str
    overrides: tuple[str, ...] = ()
    zero_router: bool = False
    padding: str = "none"

    def config(self) -> TrainConfig:
        return compose_config("train", TrainConfig, lambda config: [], [*SMALL, *self.overrides])

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(7)
        made = []
        for _ in range(STEPS):
            text = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
            tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
            if self.padding == "uneven":
                lengths = torch.randint(0, LENGTH + 1, (BATCH,), generator=generator)
                labels[torch.arange(LENGTH) >= lengths.unsqueeze(1)] = IGNORE
            if self.padding == "whole ranks":
                labels[: BATCH // 2] = IGNORE
            made.append((tokens, labels))
        return made

    def prepare(self, model: Transformer) -> Transformer:
        initialise(model, seed=3)
        if self.zero_router:  # equal logits: every token chooses the experts with the lowest indices
            for layer in model.moe_layers.values():
                layer.router.weight.data.zero_()
        return model

    def whole_model(self) -> Transformer:
        model = self.config().model
        return self.prepare(
            build_model(model, VOCAB, LocalExchange(model.ffn.num_experts), "fp64", torch.device("cpu"))
        )


def rank_batches(batch: tuple[Tensor, Tensor], rank: int, world_size: int, accumulation: int) -> list[Batch]:
    """The micro-batches of one rank: the rule of the loader."""
    rows = BATCH // (world_size * accumulation)
    starts = [micro * world_size * rows + rank * rows for micro in range(accumulation)]
    return [Batch(batch[0][s : s + rows], batch[1][s : s + rows]) for s in starts]


def gathered(model: Transformer, mesh: Mesh, pick) -> dict[str, Tensor]:
    """Whole tensors of every parameter: the experts of an EP group one after the other."""
    whole = {}
    for name, parameter in model.named_parameters():
        value = pick(parameter).detach().clone()
        if roles_of(model)[name].kind is Kind.EXPERT:
            parts = [torch.empty_like(value) for _ in range(mesh.ep.size())]
            dist.all_gather(parts, value, group=mesh.ep)
            value = torch.cat(parts)
        whole[name] = value
    return whole


def run_layout(world: World, case: Case, ep: int, accumulation: int, dtype: torch.dtype = torch.float64) -> Truth:
    """Train on this layout."""
    config = case.config()
    mesh = build_mesh(world, ep)
    exchange = exchange_for(mesh, config.model.ffn.num_experts)
    precision = {torch.float64: "fp64", torch.float32: "fp32"}[dtype]
    model = case.prepare(build_model(config.model, VOCAB, exchange, precision, world.device))
    engine = TorchEngine(model, build_optimizer(model, config.optim), mesh)
    truth = Truth([], [], [], {}, {})
    for batch, rate in zip(case.batches(), RATES, strict=True):
        tokens = int((batch[1] != IGNORE).sum())
        micro_batches = rank_batches(batch, world.rank, world.size, accumulation)
        result = train_step(engine, mesh, micro_batches, tokens, rate, config.train.clip_norm)
        figures = result.tally.measure(tokens, mesh)
        truth.losses.append(figures["loss"])
        truth.aux.append(figures.get("aux_loss", 0.0))
        truth.norms.append(result.grad_norm.item())
    truth.gradients = gathered(model, mesh, lambda p: p.grad)
    truth.weights = gathered(model, mesh, lambda p: p)
    return truth


def assert_equal(found: Truth, truth: Truth, tolerance: float, what: str) -> None:
    """Everything within ``tolerance`` of the truth, relative to the size of the tensor."""
    for name in ("losses", "aux", "norms"):
        for step, (a, b) in enumerate(zip(getattr(found, name), getattr(truth, name), strict=True)):
            assert abs(a - b) <= tolerance * max(1.0, abs(b)), f"{what}: {name} of step {step}: {a} is not {b}"
    for name in ("gradients", "weights"):
        a, b = getattr(found, name), getattr(truth, name)
        assert a.keys() == b.keys(), what
        for key in b:
            error = float((a[key].double() - b[key].double()).abs().max() / b[key].abs().max().clamp(min=1e-2))
            assert error <= tolerance, f"{what}: {name} of {key} differ by {error:.1e}"
