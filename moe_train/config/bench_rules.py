"""Rules across the fields of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_train.config.bench import (
    BenchConfig,
    ClusterBench,
    ExchangeBench,
    LayerBench,
    ModelBench,
    ModelPeers,
    ScalingBench,
    Shape,
)
from moe_train.errors import Problem


def bench_problems(config: BenchConfig) -> list[Problem]:
    """Return every broken rule of a benchmark."""
    return [*out_problems(config), *twice_problems(config), *suite_problems(config)]


def suite_problems(config: BenchConfig) -> Iterator[Problem]:
    """Yield what is wrong in the section of the suite."""
    match config.bench:
        case ScalingBench() as bench:
            yield from scaling_problems(bench)
        case ExchangeBench() as bench:
            yield from shape_problems(bench.shapes)
            yield from group_problems("bench.ranks", bench.ranks, bench.shapes)
            yield from node_problems(bench)
        case ClusterBench() as bench:
            yield from model_problems(bench)
            for ranks in bench.ranks:
                yield from group_problems("bench.ranks", ranks, bench.shapes)
                if bench.batch % ranks:
                    rule = f"must divide bench.batch={bench.batch}"
                    yield Problem("bench.ranks", ranks, rule, "change one of them")
        case ModelBench() as bench:
            yield from model_problems(bench)
        case LayerBench() as bench:
            yield from shape_problems(bench.shapes)
            yield from compute_problems(bench)


def out_problems(config: BenchConfig) -> Iterator[Problem]:
    """Refuse a folder that cannot be made, before anything that takes long."""
    folder = Path(config.out).expanduser()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Problem("out", config.out, f"{existing} is a file, not a folder", "choose another folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("out", config.out, f"{existing} may not be written", "choose another folder")


def twice_problems(config: BenchConfig) -> Iterator[Problem]:
    """Refuse lists that name something twice: rows would share their names."""
    for name in type(config.bench).model_fields:
        value = getattr(config.bench, name)
        if isinstance(value, tuple) and len(set(value)) < len(value):
            yield Problem(f"bench.{name}", listed(value), "names something twice", "name each once")


def listed(values: Iterable[object]) -> str:
    """Return a list as the command line has it."""
    return f"[{','.join(str(value) for value in values)}]"


def shape_problems(shapes: Sequence[Shape]) -> Iterator[Problem]:
    """Yield what is wrong with the experts."""
    for shape in shapes:
        if shape.top_k > shape.experts:
            yield Problem("bench.shapes", f"top_k={shape.top_k}", f"there are {shape.experts} experts", "lower top_k")


def compute_problems(bench: LayerBench) -> Iterator[Problem]:
    """Yield what a peer does not compute."""
    if "deepspeed" in bench.peers and any(shape.top_k == 1 for shape in bench.shapes):
        rule = "with one expert per token deepspeed weighs it by its probability, all others by 1"
        yield Problem("bench.peers", "deepspeed", rule, "leave it out, or raise top_k in bench.shapes")


def model_problems(bench: ModelBench) -> Iterator[Problem]:
    """Yield what is wrong with a whole model."""
    yield from shape_problems(bench.shapes)
    if bench.dim % (2 * bench.heads):
        rule = f"heads of even width must make up bench.dim={bench.dim}"
        yield Problem("bench.heads", bench.heads, rule, "change one of them")
    for peer in bench.peers:
        if peer not in ModelPeers:
            rule = "is a layer only; a whole training step is not compared with it"
            yield Problem("bench.peers", peer, rule, f"choose from {', '.join(ModelPeers)}")


def group_problems(key: str, ranks: int, shapes: Sequence[Shape]) -> Iterator[Problem]:
    """Yield which experts an EP group cannot share."""
    for shape in shapes:
        if shape.experts % ranks:
            rule = f"must divide the {shape.experts} experts of a shape in bench.shapes"
            yield Problem(key, ranks, rule, "change one of them")


def node_problems(bench: ExchangeBench) -> Iterator[Problem]:
    """Yield what is wrong with the nodes."""
    if bench.node_size is not None and bench.ranks % bench.node_size:
        rule = f"must divide bench.ranks={bench.ranks}"
        yield Problem("bench.node_size", bench.node_size, rule, "change one of them, or leave it out")


def scaling_problems(bench: ScalingBench) -> Iterator[Problem]:
    """Yield what is wrong with the curves."""
    for experts in bench.experts:
        if bench.top_k > experts:
            yield Problem("bench.top_k", bench.top_k, f"a curve has {experts} experts", "lower it")
