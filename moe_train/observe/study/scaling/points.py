"""The points of a study of scaling: what each finished run is, what it cost and what it came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import FactorCapacityConfig
from moe_train.models.build import is_moe_layer
from moe_train.models.counts import count
from moe_train.models.sizes import Size, block_size, router_size, total
from moe_train.observe.finished import final_loss
from moe_train.observe.report.record import RunRecord
from moe_train.observe.study.graph.outcome import vocabulary_of
from moe_train.observe.study.outcome import late_mean

TRAINING_PRODUCTS = 6
"""FLOPs of training per parameter that a token is multiplied with: two forwards, four backwards."""


@dataclass(frozen=True)
class Point:
    """One finished run.

    Attributes:
        name: of the run.
        seed: of its initial values and its data order.
        active_parameters: N, those of the blocks that a token uses; neither embeddings nor routers.
        total_parameters: the same with all experts.
        experts: per layer; 0: dense.
        top_k: experts that a token uses; 0: dense.
        tokens: D, tokens it was trained on.
        seq_len: positions per sequence.
        flops_per_token: of training, forward and backward, head and routers included.
        router_flops: those among them that routers cost.
        capacity_factor: limit in training relative to a balanced load; None: no limit.
        loss: final, held-out, nats per token, without limit.
        dropped_fraction: share of the assignments that found no room, mean over layers and the last quarter of the
            training; None in a dense model.
    """

    name: str
    seed: int
    active_parameters: int
    total_parameters: int
    experts: int
    top_k: int
    tokens: int
    seq_len: int
    flops_per_token: float
    router_flops: float
    capacity_factor: float | None
    loss: float
    dropped_fraction: float | None

    @property
    def expansion(self) -> float:
        """E: weights of all experts over those that a token uses; 1.0 of a dense model."""
        return self.experts / self.top_k if self.experts else 1.0

    @property
    def granularity(self) -> int:
        """G; 1 of a dense model."""
        return max(1, self.top_k)

    @property
    def training_flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def shape(self) -> str:
        """E and G, for people."""
        return f"E={self.expansion:g} G={self.granularity}" if self.experts else "dense"


def read_point(run_dir: Path) -> Point | None:
    """Return the run in ``run_dir``, or None when it is not finished or has layers that the law does not know."""
    run = RunRecord.load(run_dir)
    loss = final_loss(run)
    try:
        config = ModelConfig.model_validate(run.setting("model"))
    except ValidationError:
        return None
    if loss is None or config.ffn.graph is not None or config.depth.kind != "full":
        return None
    stored, used, routed = sizes_of(config)
    seq_len, routes = int(run.setting("data.seq_len")), config.ffn.num_experts > 0
    started = next((event["parameters"] for event in run.events if "parameters" in event), 0)
    counts = count(config, vocabulary_of(config, int(started)), seq_len)
    return Point(
        name=run.name,
        seed=int(run.setting("run.seed") or 0),
        active_parameters=used,
        total_parameters=stored,
        experts=config.ffn.num_experts,
        top_k=config.ffn.top_k if routes else 0,
        tokens=int(run.train[-1].get("tokens") or 0),
        seq_len=seq_len,
        flops_per_token=counts.training_flops_per_token,
        router_flops=float(TRAINING_PRODUCTS * routed),
        capacity_factor=factor_of(config.ffn) if routes else None,
        loss=loss,
        dropped_fraction=late_mean(run, "dropped_fraction") if routes else None,
    )


def sizes_of(config: ModelConfig) -> tuple[int, int, int]:
    """Return what the blocks store and use without routers, and what the routers multiply: numbers of parameters."""
    layers = range(config.layers)
    blocks = total(block_size(config, layer) for layer in layers)
    routers = total(router_size(config.dim, config.ffn) if is_moe_layer(config.ffn, i) else Size() for i in layers)
    return blocks.stored - routers.stored, blocks.used - routers.used, routers.multiplied


def factor_of(ffn: FFNConfig) -> float | None:
    """Return the capacity factor in training, or None without a limit."""
    return ffn.capacity.factor if isinstance(ffn.capacity, FactorCapacityConfig) else None
