"""Programs beside each other: each in processes of its own, one for every allocator, timed in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final

from moe_train.benchmark.results import VARIANT, Row
from moe_train.benchmark.timing import Times, measure
from moe_train.benchmark.workers import Together, Worker, WorkerError

CHECKED: Final = "tuned"
"""The allocator under which a program also checks its results: they are the same under any."""


@dataclass(frozen=True)
class Program:
    """Something that builds variants, in a process of its own.

    Attributes:
        name: in notes, and that of its row where it has no variants.
        builder: ``module:function``.
        own: arguments of its own, beside those of a case.
        under: the variables of each setting in which it is run; none: it is told, not run.
        note: what to know about it.
    """

    name: str
    builder: str
    own: Mapping[str, Any]
    under: Mapping[str, Mapping[str, str | None]]
    note: str = ""


@dataclass
class Found:
    """What was found of one program in one case.

    Attributes:
        program: which.
        variants: its variants, in order.
        times: by variant and setting.
        facts: by their full names.
        failures: by variant (empty: all of them) and setting.
    """

    program: Program
    variants: list[str] = field(default_factory=list)
    times: dict[tuple[str, str], Times] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def rows(self, labels: Mapping[str, str]) -> Iterator[Row]:
        """Yield a row per variant, with the fastest of its settings."""
        for variant in self.variants or [self.program.name]:
            timed = {setting: times for (name, setting), times in self.times.items() if name == variant}
            best = min(timed, key=lambda setting: timed[setting].median_ms, default=None)
            facts = {
                name.removeprefix(f"{variant}:"): value
                for name, value in self.facts.items()
                if name.startswith(f"{variant}:")
            }
            yield Row(
                labels={**labels, VARIANT: variant},
                times=None if best is None else timed[best],
                facts=facts,
                note="; ".join(filter(None, [self.program.note, *self.told(variant)])),
                setting=best or "",
                others={setting: times for setting, times in timed.items() if setting != best},
            )

    def told(self, variant: str) -> list[str]:
        """Return what went wrong with a variant, by setting; once where it is the same in all of them."""
        reasons = {setting: why for (name, setting), why in self.failures.items() if name in ("", variant)}
        if len(reasons) == len(self.program.under) and len(set(reasons.values())) == 1:
            return [f"failed: {next(iter(reasons.values()))}"]
        return [f"failed under {setting}: {why}" for setting, why in reasons.items()]


class Fleet:
    """Workers of several programs, kept from case to case: to start one takes seconds.

    Args:
        programs: in the order of the rows.
        environment: variables of all of them.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, programs: Iterable[Program], environment: Mapping[str, str | None], timeout_s: float) -> None:
        self.programs = tuple(programs)
        self.environment = environment
        self.timeout_s = timeout_s
        self.workers: dict[tuple[str, str], Worker] = {}

    def time(self, arguments: Mapping[str, Any], rounds: int, warmup: int) -> list[Found]:
        """Build all programs' variants of a case and time them; what fails is told, the rest is timed to the end.

        Args:
            arguments: of the case, for all; ``checks`` is added.
            rounds: how often each variant is timed.
            warmup: rounds before them.
        """
        found = {program.name: Found(program) for program in self.programs}
        self.build(arguments, found)
        timed = {
            (name, setting, variant): Together((worker,), variant)
            for (name, setting), worker in self.workers.items()
            if ("", setting) not in found[name].failures
            for variant in worker.ready()["variants"]
        }
        measured = measure({"\n".join(key): variant for key, variant in timed.items()}, rounds, warmup)
        for name, setting, variant in timed:
            key = "\n".join((name, setting, variant))
            if variant not in found[name].variants:
                found[name].variants.append(variant)
            if key in measured.failures:
                found[name].failures[variant, setting] = measured.failures[key]
            else:
                found[name].times[variant, setting] = measured.times[key]
        return list(found.values())

    def build(self, arguments: Mapping[str, Any], found: Mapping[str, Found]) -> None:
        """Have all workers build a case at the same time, and note what they know and what they cannot."""
        places = [(program, setting) for program in self.programs for setting in program.under]
        for program, setting in places:
            try:
                self.order(program, setting, {**arguments, **program.own, "checks": setting == CHECKED})
            except WorkerError as error:
                found[program.name].failures["", setting] = str(error)
        for program, setting in places:
            if ("", setting) in found[program.name].failures:
                continue
            try:
                found[program.name].facts |= self.workers[program.name, setting].ready()["facts"]
            except WorkerError as error:
                found[program.name].failures["", setting] = str(error)

    def order(self, program: Program, setting: str, arguments: Mapping[str, Any]) -> None:
        """Ask a worker for a case; one that is not there, or no longer, is started."""
        worker = self.workers.get((program.name, setting))
        if worker is not None and worker.is_alive:
            worker.order(arguments)
            return
        if worker is not None:
            worker.close()
        environment = {**self.environment, **program.under[setting]}
        self.workers[program.name, setting] = Worker(program.builder, arguments, environment, self.timeout_s)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers.values():
            worker.close()


def beside(rows: Iterable[Row], ours: str, peers: Iterable[str]) -> list[Row]:
    """Return the rows of a case, with how much faster than each peer ours are: medians over the rounds.

    Args:
        rows: of one case.
        ours: what the names of our variants begin with.
        peers: names of variants.
    """
    rows = list(rows)
    times = {row.variant: row.times for row in rows if row.variant in set(peers) and row.times is not None}
    return [
        replace(row, facts={**row.facts, **faster(row.times, times)})
        if row.variant.startswith(ours) and row.times is not None
        else row
        for row in rows
    ]


def faster(times: Times, others: Mapping[str, Times]) -> dict[str, float]:
    """Return the speed relative to each of the others."""
    return {f"times {name}": statistics.median(times.ratio_to(other).of_rounds) for name, other in others.items()}
