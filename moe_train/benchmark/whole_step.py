"""What a rank of the cluster suite times: its share of one optimizer step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch

from moe_train.benchmark.model_case import ModelCase, draw_tokens
from moe_train.benchmark.ranks import Abreast, join
from moe_train.benchmark.timing import Timed
from moe_train.benchmark.traffic import Moved, Visits, Watched, journey_bytes, metered
from moe_train.config.schema import ParallelConfig, TrainConfig
from moe_train.data.loader import Batch
from moe_train.dist.mesh import Layout
from moe_train.dist.meter import METER
from moe_train.dist.world import World
from moe_train.models.transformer import PRECISIONS, Transformer
from moe_train.moe.exchange.choose import choice_for
from moe_train.moe.layer import MoELayer
from moe_train.ops.loss import cross_entropy_sum

STEP, EXCHANGE_MS = "step", "exchange_ms"
"""Variants of a rank: the step, and the median time of the exchanges within those that were run."""
Compile: TypeAlias = Literal["none", "pointwise", "block"]
"""Values of train.compile."""
Trainer: TypeAlias = Callable[[TrainConfig, World, Batch, int], tuple[Transformer, Callable[[], object]]]
"""Returns a model on the ranks, with a vocabulary, and one optimizer step on this rank's rows. Collective."""


@dataclass
class Metered:
    """A step whose exchanges are timed beside it.

    Attributes:
        timed: the step.
        exchange_ms: of each run.
    """

    timed: Timed
    exchange_ms: list[float] = field(default_factory=list)

    def run_ms(self) -> float:
        """Run once."""
        METER.take_ms()
        ms = self.timed.run_ms()
        self.exchange_ms.append(METER.take_ms())
        return ms


@dataclass(frozen=True)
class Exchanged:
    """What the exchanges of a step took, in the place of a variant.

    Attributes:
        metered: the step.
    """

    metered: Metered

    def run_ms(self) -> float:
        """Return the median over the runs so far, of this rank, waiting for slower ones included."""
        return statistics.median(self.metered.exchange_ms)


def config_of(case: ModelCase, compile_value: Compile, size: int) -> TrainConfig:
    """Return the training that is timed, on so many ranks."""
    return case.training(False, compile_value).model_copy(update={"parallel": ParallelConfig(ep=size)})


def share(case: ModelCase, world: World) -> Batch:
    """Return this rank's rows of a global batch that is the same on any number of ranks."""
    rows = case.batch // world.size
    own = slice(world.rank * rows, (world.rank + 1) * rows)
    tokens_BS, labels_BS = draw_tokens(case)
    return Batch(tokens_BS[own], labels_BS[own], first_sequence=own.start)


def mean_loss(model: Transformer, batch: Batch, world: World) -> float:
    """Return the loss of the global batch in nats per token; it must not depend on the layout. Collective."""
    with torch.no_grad():
        logits_BSV = model(batch.tokens_BS).logits_BSV
    total = cross_entropy_sum(logits_BSV.flatten(0, 1), batch.labels_BS.flatten()).double()
    return float(world.sum_on_host(total)) / (batch.tokens_BS.numel() * world.size)


def watch(model: Transformer, config: TrainConfig, world: World) -> list[Watched]:
    """Put something that counts where tokens go before the exchange of each layer."""
    watched = []
    for layer in model.moe_layers.values():
        assert isinstance(layer, MoELayer), "the suite's layers are sparse"
        seen = Watched(layer.exchange, config.model.ffn.num_experts, world.rank, world.size, world.size)
        layer.exchange = seen
        watched.append(seen)
    return watched


def moved(step: Callable[[], object], watched: list[Watched], config: TrainConfig, world: World) -> Moved:
    """Return what one step moves, by the meter, and by closed form from what it routes. Collective."""
    ffn, layout = config.model.ffn, Layout(world.size, world.size)
    kind = choice_for(layout, ffn.num_experts, False, config.parallel, ffn.top_k, world.size).kind
    once = journey_bytes(config.model.dim, ffn.top_k, PRECISIONS[config.train.precision].activations.itemsize)
    tokens = config.train.global_batch * config.data.seq_len
    for seen in watched:
        seen.watches = True
    found = metered(step, world, closed_bytes=0, tokens=tokens)
    visits = sum((seen.seen for seen in watched), Visits()).of_all(world)
    for seen in watched:
        seen.watches = False
    return replace(found, closed_bytes=once * visits.journeys(kind, world.size))


def build(arguments: Mapping[str, Any], trainer: Trainer) -> Mapping[str, Timed | float]:
    """Build the step of one rank; with a trainer it is a builder of workers.

    Args:
        arguments: ``case`` (a `ModelCase`), ``compile`` and what `join` takes.
        trainer: makes the step; benchmarks do not know it.
    """
    case, world = ModelCase.parse(arguments["case"]), join(arguments)
    config, batch = config_of(case, arguments["compile"], world.size), share(case, world)
    model, step = trainer(config, world, batch, case.vocab_size)
    loss = mean_loss(model, batch, world)
    watched = watch(model, config, world)
    step()  # the first makes what later ones keep
    facts = {"loss": loss, **moved(step, watched, config, world).facts}
    timed = Metered(Abreast(world, step))
    return {STEP: timed, EXCHANGE_MS: Exchanged(timed), **facts}
