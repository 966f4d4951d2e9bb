"""Two launchers on one machine, each with ranks of its own, are the multi-node code: rendezvous, restart, stop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch import (
    ROOT,
    Command,
    Ended,
    assert_same_tensors,
    checkpoint_path,
    curve,
    free_port,
    records,
    run,
    running,
    wait_for_step,
)

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def two_nodes(overrides: Sequence[str], folder: Path) -> Iterator[list[Command]]:
    """Run ``launch/nodes.sh`` twice, two ranks each, for as long as the context lasts."""
    words = ["bash", str(ROOT / "launch/nodes.sh"), "2", f"127.0.0.1:{free_port()}", "2", *overrides]
    alone = {"GLOO_SOCKET_IFNAME": "lo", "STOP_S": "60"}
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running(words, folder, alone)) for _ in range(2)]


def wait_for_both(nodes: list[Command], timeout_s: float) -> list[Ended]:
    return [node.wait(timeout_s) for node in nodes]


@pytest.fixture
def settings(tiny: list[str]) -> list[str]:
    return [*tiny, "parallel.ep=4", "model.ffn.num_experts=8", "checkpoint.every=4"]


def test_two_nodes_make_the_run_of_one_machine(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "train.steps=8"]
    with two_nodes([*overrides, f"run.dir={tmp_path}/two"], tmp_path) as nodes:
        ended = wait_for_both(nodes, 120.0)
    assert [node.status for node in ended] == [0, 0], ended
    run("train", [*overrides, f"run.dir={tmp_path}/one"], tmp_path, ranks=4)
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    chosen = [record["message"] for record in records(tmp_path / "two", "event") if record["event"] == "exchange"]
    # The launchers say that a node has two ranks: C(8, 2) choices, of which C(6, 2) leave a rank out, C(4, 2) a node.
    reason = "a token visits 0.93 ranks in 0.79 other nodes of 2: a second leg would save too little"
    assert chosen == [f"exchange alltoall: {reason}"]
    assert_same_tensors(checkpoint_path(tmp_path / "two", 8), checkpoint_path(tmp_path / "one", 8))


def test_a_run_whose_rank_was_killed_goes_on_by_itself(settings: list[str], tmp_path: Path) -> None:
    """Every other rank ends and names the dead one; torchrun starts all again, from the last checkpoint."""
    overrides = [*settings, "train.steps=40"]
    with two_nodes([*overrides, f"run.dir={tmp_path}/run"], tmp_path) as nodes:
        wait_for_step(nodes[0], tmp_path / "run", 6)
        ranks = {rank: (node, pid) for node in nodes for rank, pid in node.rank_pids().items()}
        assert sorted(ranks) == [0, 1, 2, 3]
        os.kill(ranks[2][1], signal.SIGKILL)
        ended = wait_for_both(nodes, 180.0)
    assert [node.status for node in ended] == [0, 0], ended
    told = [line for node in ended for line in node.stderr.splitlines() if "run ended: " in line]
    assert {rank for line in told for rank in re.findall(r"\[rank (\d)\] run ended", line)} == {"0", "1", "3"}, told
    assert all("lost rank 2 (host " in line for line in told), told
    run("train", [*overrides, f"run.dir={tmp_path}/twin"], tmp_path, ranks=4)
    found, truth = curve(tmp_path / "run"), {row[0]: row for row in curve(tmp_path / "twin")}
    assert [row for row in found if row != truth[row[0]]] == [], "the repeated steps too"
    assert {row[0] for row in found} == truth.keys()
    events = [record["event"] for record in records(tmp_path / "run", "event")]
    assert events.count("started") == events.count("resumed") == 1
    assert_same_tensors(checkpoint_path(tmp_path / "run", 40), checkpoint_path(tmp_path / "twin", 40))


@pytest.mark.parametrize("first", [0, 1])
def test_a_signal_to_one_node_saves_the_run_of_all(first: int, settings: list[str], tmp_path: Path) -> None:
    """What a scheduler sends before the time is over reaches the ranks of one node; all stop at the same step.

    The other launcher took its ranks' end for a fault and waited for ten minutes for the first one to come back,
    unless it was the first one that kept their store.
    """
    with two_nodes(
        [*settings, "train.steps=100000", f"run.dir={tmp_path}/run", "checkpoint.every=0"], tmp_path
    ) as nodes:
        wait_for_step(nodes[0], tmp_path / "run", 3)
        nodes[first].signal(signal.SIGUSR1)
        ended = wait_for_both(nodes, 90.0)
    assert all(node.status != 0 for node in ended)
    last = max(step for step, *_ in curve(tmp_path / "run"))
    assert checkpoint_path(tmp_path / "run", last).is_dir()
