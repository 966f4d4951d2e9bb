"""Workers: what they answer, and that no way to fail is silent or blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from bench_samples import MADE, REACHABLE

from moe_train.benchmark.fleet import Fleet, Program
from moe_train.benchmark.results import Row
from moe_train.benchmark.workers import Together, Worker, WorkerError

MUCH = 1 << 20
"""Bytes: more than a pipe holds."""


def arguments(**variants: float | str) -> dict[str, Any]:
    return {"variants": variants, "checks": False}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(MADE, {**arguments(a=1.5, fails="fails"), "noise": MUCH}, REACHABLE, timeout_s=60) as started:
        yield started


def test_a_worker_tells_variants_and_facts_whatever_else_it_prints(worker: Worker) -> None:
    answer = worker.rebuild(arguments(a=1.5, fails="fails"))
    assert answer["variants"] == ["a", "fails"]
    assert answer["facts"]["a:flops"] == 7.0
    assert Together((worker,), "a").run_ms() == 1.5


def test_a_failing_run_names_its_variant_and_the_worker_lives_on(worker: Worker) -> None:
    worker.rebuild(arguments(a=1.5, fails="fails"))
    with pytest.raises(WorkerError, match=r"^fails: ValueError: it broke$"):
        Together((worker,), "fails").run_ms()
    with pytest.raises(WorkerError, match="unknown: KeyError"):
        Together((worker,), "unknown").run_ms()
    assert Together((worker,), "a").run_ms() == 1.5


def test_other_variants_take_the_place_of_the_first_in_the_same_process(worker: Worker) -> None:
    first = worker.rebuild(arguments(a=1.0))["facts"]["pid"]
    answer = worker.rebuild(arguments(b=4.0))
    assert (answer["variants"], answer["facts"]["pid"]) == (["b"], first)
    assert Together((worker,), "b").run_ms() == 4.0


def test_what_cannot_be_built_is_told_as_often_as_asked(worker: Worker) -> None:
    worker.order({**arguments(), "refuses": "no room"})
    for _ in range(2):
        with pytest.raises(WorkerError, match="RuntimeError: no room"):
            worker.ready()
    assert worker.rebuild(arguments(a=1.0))["variants"] == ["a"]


def test_the_slowest_of_several_counts_and_a_failure_leaves_no_answer_over(worker: Worker) -> None:
    worker.rebuild(arguments(both=1.0, half="fails"))
    with Worker(MADE, arguments(both=9.0, half=1.0), REACHABLE, timeout_s=60) as other:
        other.ready()
        assert Together((worker, other), "both").run_ms() == 9.0
        with pytest.raises(WorkerError, match="half: ValueError"):
            Together((worker, other), "half").run_ms()
        assert Together((worker, other), "both").run_ms() == 9.0
        assert Together((other, worker), "both").run_ms() == 9.0


def test_last_words_of_a_worker_that_died_are_told() -> None:
    with Worker(MADE, arguments(dies="dies"), REACHABLE, timeout_s=60) as worker:
        worker.ready()
        with pytest.raises(WorkerError, match="dies: last words"):
            Together((worker,), "dies").run_ms()
        assert not worker.is_alive
        with pytest.raises(WorkerError, match="last words"):
            Together((worker,), "dies").run_ms()


def test_a_killed_worker_says_what_it_may_mean() -> None:
    """Ten processes with a model each did not fit into memory, and the table said "ended with status -9"."""
    with Worker(MADE, arguments(killed="killed"), REACHABLE, timeout_s=60) as started:
        started.ready()
        with pytest.raises(WorkerError, match="killed: killed, as the system does when memory runs out"):
            Together((started,), "killed").run_ms()


def test_a_worker_that_hangs_is_given_up() -> None:
    with Worker(MADE, arguments(hangs="hangs"), REACHABLE, timeout_s=60) as worker:
        worker.ready()
        worker.timeout_s = 0.5
        start_s = time.monotonic()
        with pytest.raises(WorkerError, match=r"hangs: no answer within 0\.5 s"):
            Together((worker,), "hangs").run_ms()
        assert time.monotonic() - start_s < 20
        worker.close()
        assert not worker.is_alive


def test_a_builder_that_does_not_exist_is_told() -> None:
    with (
        Worker("no_such_module:build", {}, {}, timeout_s=60) as worker,
        pytest.raises(WorkerError, match="no_such_mod"),
    ):
        worker.ready()


def by_variant(rows: list[Row]) -> dict[str, Row]:
    return {row.variant: row for row in rows}


def test_a_fleet_takes_the_fastest_setting_and_survives_all_failures() -> None:
    under = {"default": {"EXTRA_MS": "10"}, "tuned": {"EXTRA_MS": "0"}}
    programs = [
        Program("ours", MADE, arguments(quick=1.0, checked=2.0), {"tuned": {}}, "as it is"),
        Program("peer", MADE, arguments(peer=3.0, broken="fails"), under),
        Program("lost", MADE, {**arguments(), "refuses": "no room"}, under),
        Program("dying", MADE, arguments(dying="dies"), {"tuned": {}}),
        Program("absent", "nowhere:build", {}, {}, "left out"),
    ]
    with Fleet(programs, REACHABLE, timeout_s=60) as fleet:
        for _ in range(2):  # a worker that died is started again
            found = fleet.time({}, rounds=2, warmup=1)
            rows = by_variant([row for one in found for row in one.rows({"shape": "s"})])
    assert list(rows) == ["quick", "checked", "peer", "broken", "lost", "dying", "absent"]
    assert rows["quick"].times is not None
    assert rows["quick"].times.ms == (1.0, 1.0)
    assert (rows["quick"].setting, rows["quick"].facts, rows["quick"].note) == ("tuned", {"flops": 7.0}, "as it is")
    assert rows["checked"].facts["in"] == 1.0, "results are checked under the tuned allocator"
    assert rows["peer"].setting == "tuned"
    assert {name: times.ms for name, times in rows["peer"].others.items()} == {"default": (13.0, 13.0)}
    assert rows["broken"].note == "failed: broken: ValueError: it broke"
    assert rows["lost"].note.endswith("no room")
    assert rows["lost"].note.count("no room") == 1, "one note for what happens everywhere"
    assert rows["dying"].note == "failed: dying: last words"
    assert rows["absent"].note == "left out"
    for name in ("broken", "lost", "dying", "absent"):
        assert rows[name].times is None
