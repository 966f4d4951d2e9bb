"""What a layer costs per token against the number of experts, the tokens, the length of texts and the EP size."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping

from moe_train.benchmark.allocators import num_cores
from moe_train.benchmark.curves import CURVES, Curve, Point, middle_of, points_of
from moe_train.benchmark.ranks import rank_environment, ranks
from moe_train.benchmark.results import VARIANT, Row, SuiteResult, growing
from moe_train.benchmark.timing import Timed, Times, VariantError, interleave
from moe_train.benchmark.workers import Together, Worker, WorkerError
from moe_train.config.bench import BenchConfig, ScalingBench

BUILDER, RANK_BUILDER = "moe_train.benchmark.curves:build", "moe_train.benchmark.curves:build_rank"
CURVE, X, TOKENS, REFERENCE = "curve", "x", "tokens", "reference"
"""A label and facts that scripts/bench_picture.py reads."""
RELATIVE = "cost per token, relative"
"""The fact that matters."""
LINEAR_WITHIN = 0.15
"""Cost per token may differ by this share between numbers of tokens."""


def run(config: BenchConfig) -> Iterator[SuiteResult]:
    """Time the points of every curve, each curve's in turn; yield what is known after each curve."""
    bench = config.bench
    assert isinstance(bench, ScalingBench), "the door chooses the suite by its kind"
    timed = (rows_of(config, bench, curve) for curve in CURVES)
    about = (
        f"Forward and backward, D={bench.dim}, K={bench.top_k}, F={bench.expert_dim}, {config.precision}. E: experts "
        "of a layer at equal active FLOPs; T: tokens per call; S: positions per sequence of a whole block; EP: as many "
        f"processes of one thread at equal tokens over all. Where nothing else is said E={bench.experts[0]}, "
        f"T={middle_of(bench.tokens)}, {config.threads or num_cores()} thread(s). Cost per token is relative to the "
        "curve's middle, that of EP to its first: medians over rounds of the quotient within a round."
    )
    yield from growing("scaling", about, "", timed)


def rows_of(config: BenchConfig, bench: ScalingBench, curve: Curve) -> list[Row]:
    """Return the rows of one curve; if a process fails, rows that say so."""
    points = points_of(bench, curve)
    if not points:
        return []
    try:
        with variants_of(config, curve, points) as variants:
            times = interleave(variants, config.rounds, config.warmup)
    except (WorkerError, VariantError) as error:
        return [failed_row(point, str(error)) for point in points]
    reference = points[0] if curve == "ep" else points[(len(points) - 1) // 2]
    return [row_of(point, times[point.name], reference, times[reference.name]) for point in points]


@contextlib.contextmanager
def variants_of(config: BenchConfig, curve: Curve, points: list[Point]) -> Iterator[Mapping[str, Timed]]:
    """Start the processes of a curve: one for all points, but for EP a group for each."""
    arguments = {"config": config.model_dump(mode="json"), "curve": curve}
    with contextlib.ExitStack() as stack:
        if curve == "ep":
            alone = rank_environment(1)
            groups = {p.name: stack.enter_context(ranks(RANK_BUILDER, arguments, p.x, alone)) for p in points}
            yield {name: group.timed(name) for name, group in groups.items()}
        else:
            environment = rank_environment(config.threads or num_cores())
            worker = stack.enter_context(Worker(BUILDER, arguments, environment))
            worker.ready()
            yield {point.name: Together((worker,), point.name) for point in points}


def labels_of(point: Point) -> dict[str, str]:
    """Return which row it is."""
    return {CURVE: point.curve, VARIANT: point.name}


def failed_row(point: Point, why: str) -> Row:
    """Return the row of a point that could not be timed."""
    return Row(labels_of(point), None, {X: float(point.x)}, f"failed: {why}")


def row_of(point: Point, times: Times, reference: Point, reference_times: Times) -> Row:
    """Return the row of one point."""
    relative = statistics.median(relative_costs(point, times, reference, reference_times))
    facts = {
        X: float(point.x),
        TOKENS: float(point.tokens),
        REFERENCE: float(point == reference),
        "µs per token": times.median_ms / point.tokens * 1e3,
        RELATIVE: relative,
    }
    is_bent = point.curve == "tokens" and abs(relative - 1.0) > LINEAR_WITHIN
    return Row(labels_of(point), times, facts, f"more than {LINEAR_WITHIN:.0%} from linear" if is_bent else "")


def relative_costs(point: Point, times: Times, reference: Point, reference_times: Times) -> list[float]:
    """Return the time per token relative to that of another point, round by round."""
    pairs = zip(times.ms, reference_times.ms, strict=True)
    return [(ms / point.tokens) / (other_ms / reference.tokens) for ms, other_ms in pairs]
