"""Runs training steps with and without recomputation, on any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from layouts import IGNORE, RATES, VOCAB, Case, rank_batches
from oracle import BOUNDARY
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train.dist.comm import METER
from moe_train.dist.mesh import Mesh
from moe_train.models.exchange import model_exchange
from moe_train.models.transformer import Transformer, build_model
from moe_train.parallel.engine import TorchEngine
from moe_train.parallel.remat import Remat, apply_remat
from moe_train.parallel.shard import shard
from moe_train.training.optim import build_optimizer
from moe_train.training.schedule import settings_at
from moe_train.training.step import train_step

MODES: tuple[Remat, ...] = ("selective", "full")


@dataclass
class Ran:
    """What training steps left.

    Attributes:
        figures: of each step.
        norms: of each step.
        tensors: gradients of the last step and weights after it.
        rows_sent: calls of the collectives that bring rows, forwards and backwards.
    """

    figures: list[dict[str, Any]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows_sent: int = 0


def model_of(case: Case, mesh: Mesh, precision: str) -> Transformer:
    """The model of a case with values, on a layout."""
    config = case.config()
    exchange = model_exchange(mesh, config.model)
    return case.prepare(build_model(config.model, VOCAB, exchange, precision, torch.device("cpu")))


def run(
    case: Case,
    mesh: Mesh,
    change: Callable[[Transformer], None],
    accumulation: int = 1,
    steps: int = 1,
    precision: str = "fp64",
) -> Ran:
    """Train a model that was changed after it was built."""
    model, config, ran = model_of(case, mesh, precision), case.config(), Ran()
    change(model)
    if mesh.sharding is not None:
        shard(model, mesh, torch.bfloat16 if precision == "bf16" else None)
    engine = TorchEngine(model, build_optimizer(model, config.optim), mesh)
    METER.take_ms()
    for step, (batch, rate) in enumerate(zip(case.batches()[:steps], RATES, strict=False)):
        tokens = int((batch[1] != IGNORE).sum())
        settings = replace(settings_at(step, config, BOUNDARY), learning_rate=rate)
        result = train_step(
            engine, mesh, rank_batches(batch, mesh.rank, mesh.layout.world_size, accumulation), tokens, settings
        )
        ran.figures.append(result.tally.measure(tokens, mesh))
        ran.norms.append(result.grad_norm.item())
    ran.rows_sent = METER.calls
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        ran.tensors |= {name: held(parameter), f"gradient of {name}": held(parameter.grad)}
    ran.tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return ran


def held(x: Tensor) -> Tensor:
    """A copy of what this rank holds of a tensor."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()


def differences(found: Ran, expected: Ran) -> list[str]:
    """What is not the same, bit for bit."""
    assert found.tensors.keys() == expected.tensors.keys()
    wrong = [name for name, value in expected.tensors.items() if not torch.equal(found.tensors[name], value)]
    wrong += ["figures"] * (found.figures != expected.figures) + ["norms"] * (found.norms != expected.norms)
    return wrong


def remat(mode: Remat) -> Callable[[Transformer], None]:
    """The change that recomputes."""
    return lambda model: apply_remat(model, mode)
