"""The cluster suite: one global batch, whatever the processes; the same loss; bytes by closed form."""

from __future__ import annotations

import pytest
import torch

from moe_train.benchmark.model_case import ModelCase
from moe_train.benchmark.results import finished
from moe_train.benchmark.suites.cluster import run, sizes_of, variant_of
from moe_train.benchmark.timing import Here
from moe_train.benchmark.whole_step import Exchanged, Metered, share
from moe_train.config.bench import BenchConfig, ClusterBench, Shape
from moe_train.data.loader import Batch
from moe_train.dist.meter import METER
from moe_train.dist.world import World

SMALL = ClusterBench(
    shapes=(Shape(experts=4, top_k=2, expert_dim=16),),
    layers=2,
    dim=32,
    heads=2,
    vocab_size=64,
    seq_len=16,
    batch=4,
    ranks=(2,),
)
STEP = "moe_train.bench:rank_step"
CONFIG = BenchConfig(bench=SMALL, rounds=2, warmup=1, precision="fp32", threads=1)


def test_one_process_and_two() -> None:
    result = finished(run(CONFIG, STEP))
    alone, both = result.rows
    assert [row.variant for row in result.rows] == ["1 process, 1 thread", "2 processes, 1 thread, EP=2"]
    assert alone.note == both.note == ""
    assert result.baseline == alone.variant
    assert both.facts["loss"] == pytest.approx(alone.facts["loss"], rel=1e-5)
    assert both.facts["loss"] == pytest.approx(torch.tensor(64.0).log().item(), rel=0.05)
    assert alone.facts["bytes_per_token"] == alone.facts["exchange_ms"] == 0.0
    assert both.facts["bytes_per_token"] == both.facts["closed_form_bytes_per_token"] > 0.0
    assert 0.0 < both.facts["exchange_ms"] < max(both.times.ms)
    assert result.ratio_of(both) is not None


def test_ranks_share_the_global_batch_in_order() -> None:
    case = ModelCase.of(CONFIG, SMALL, SMALL.shapes[0])

    def shares(size: int) -> list[Batch]:
        return [share(case, World(rank, size, torch.device("cpu"), 1.0)) for rank in range(size)]

    (whole,) = shares(1)
    assert torch.equal(whole.tokens_BS[:, 1:], whole.labels_BS[:, :-1])
    assert torch.equal(torch.cat([batch.tokens_BS for batch in shares(2)]), whole.tokens_BS)
    assert torch.equal(torch.cat([batch.labels_BS for batch in shares(2)]), whole.labels_BS)
    assert [batch.first_sequence for batch in shares(4)] == [0, 1, 2, 3]


def test_processes_share_the_cores() -> None:
    assert variant_of(1, 4) == "1 process, 4 threads"
    assert variant_of(2, 4) == "2 processes, 2 threads, EP=2"
    assert variant_of(4, 2) == "4 processes, 1 thread, EP=4"
    assert sizes_of(SMALL.model_copy(update={"ranks": (4, 1, 2)})) == [1, 4, 2]


def test_the_time_of_exchanges_is_that_of_each_run() -> None:
    waits_s = iter([0.5, 0.003, 0.001])  # the first holds what was waited for before; it is one of three

    def work() -> None:
        METER.seconds += next(waits_s)

    METER.seconds += 7.0  # not this step's
    metered = Metered(Here(work))
    for _ in range(3):
        metered.run_ms()
    assert Exchanged(metered).run_ms() == pytest.approx(3.0)
    assert metered.exchange_ms == pytest.approx([500.0, 3.0, 1.0])
