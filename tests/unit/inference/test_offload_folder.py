"""The folder of experts: written once, gone on with, written anew when stale, refused when it cannot be."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from offload_samples import loaded, logits_of, save_run
from safetensors.torch import load_file
from spawn import run_ranks

from moe_train.dist.world import World, joined
from moe_train.errors import CheckpointError, ConfigError, DataError
from moe_train.inference.offload import folder as folder_module
from moe_train.inference.offload.folder import CLAIM, INDEX
from moe_train.inference.offload.source import Source


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    alone = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), alone):
        yield alone


@pytest.fixture
def run_dir(tmp_path: Path, world: World) -> Path:
    save_run(tmp_path / "run", world)
    return tmp_path / "run"


MANY = ["model.dim=256", "model.ffn.num_experts=32", "model.ffn.expert_dim=512"]
"""64 experts of two tensors, 0.5 and 1 MiB."""


def anonymous_mib() -> float:
    """The resident memory of this process that is of no file."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux says how much memory a process has"
    return int(found[1]) / 1024


def save_many(world: World, folder: Path) -> None:
    save_run(folder, world, *MANY)


def growth_while_writing(world: World, folder: Path) -> list[float]:
    """By how many MiB this process has grown since the first record, at each of the others."""
    at_records: list[float] = []
    write_record = folder_module.write_record

    def noted(*args: Any) -> None:
        write_record(*args)
        at_records.append(anonymous_mib())

    folder_module.write_record = noted
    loaded(folder, world, 1)
    assert len(at_records) == 64
    return [mib - at_records[0] for mib in at_records[1:]]


@pytest.mark.slow  # a fresh process, some hundred megabytes of experts
def test_writing_many_experts_takes_the_memory_of_one(tmp_path: Path) -> None:
    """It once grew by what it wrote: what each read left behind stood in the places that tensors had given back.

    In a process of its own, which has no free memory from before.
    """
    run_ranks(save_many, 1, tmp_path)
    (growth_mib,) = run_ranks(growth_while_writing, 1, tmp_path)
    assert max(growth_mib) < 12, growth_mib


def times_of(records: Path) -> dict[str, int]:
    return {str(path.relative_to(records)): path.stat().st_mtime_ns for path in records.rglob("*.safetensors")}


def test_records_are_what_the_library_reads_in_the_dtype_of_activations(tmp_path: Path, world: World) -> None:
    save_run(tmp_path, world, "train.precision=bf16")
    truth = dict(loaded(tmp_path, world, None).model.named_parameters())
    loaded(tmp_path, world, 2)
    found = load_file(tmp_path / "experts/blocks.1.ffn.experts/00003.safetensors")
    name = "blocks.1.ffn.experts.gate_up_LDF2"
    assert found.keys() == {f"{name}.3", "blocks.1.ffn.experts.down_LFD.3"}
    assert found[f"{name}.3"].dtype == torch.bfloat16
    assert torch.equal(found[f"{name}.3"], truth[name][3].bfloat16())
    index = json.loads((tmp_path / "experts" / INDEX).read_text())
    assert index["dtype"] == "BF16" and index["checkpoint"]["step"] == 1
    assert index["layers"]["blocks.1.ffn.experts"]["experts"] == 8
    assert index["layers"]["blocks.1.ffn.experts"]["expert_bytes"] == sum(t.numel() for t in found.values()) * 2


def test_a_whole_folder_is_not_written_again_and_may_be_read_only(run_dir: Path, world: World, monkeypatch) -> None:
    truth = logits_of(loaded(run_dir, world, 2))
    before = times_of(run_dir / "experts")
    assert len(before) == 16
    monkeypatch.setattr(folder_module, "claim", lambda folder: pytest.fail("nothing is to be written"))
    assert torch.equal(logits_of(loaded(run_dir, world, 2)), truth)
    assert times_of(run_dir / "experts") == before


def test_experts_of_another_checkpoint_are_written_anew(run_dir: Path, world: World, caplog) -> None:
    old = loaded(run_dir, world, 1)
    before, first = times_of(run_dir / "experts"), logits_of(old)
    save_run(run_dir, world, seed=1, step=2)
    truth = logits_of(loaded(run_dir, world, None))
    assert not torch.equal(truth, first)
    assert torch.equal(logits_of(loaded(run_dir, world, 1)), truth)
    assert "written anew" in caplog.text
    after = times_of(run_dir / "experts")
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)
    with pytest.raises(DataError, match="another checkpoint"):  # not wrong values
        logits_of(old)


def test_another_dtype_is_stale(run_dir: Path, world: World) -> None:
    loaded(run_dir, world, 1)
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("precision: fp32", "precision: bf16"))
    truth = logits_of(loaded(run_dir, world, None))
    assert torch.equal(logits_of(loaded(run_dir, world, 1)), truth)


@pytest.mark.parametrize("harm", ["missing", "cut", "other"])
def test_single_records_are_mended(run_dir: Path, world: World, harm: str) -> None:
    truth = logits_of(loaded(run_dir, world, 2))
    records = run_dir / "experts"
    before, path = times_of(records), records / "blocks.0.ffn.experts/00005.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes((path.parent / "00004.safetensors").read_bytes())
    assert torch.equal(logits_of(loaded(run_dir, world, 2)), truth)
    changed = {name for name, time in times_of(records).items() if before[name] != time}
    assert changed == {"blocks.0.ffn.experts/00005.safetensors"}


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_record_that_goes_while_in_use_is_an_error_with_its_name(run_dir: Path, world: World, harm: str) -> None:
    trained = loaded(run_dir, world, 1)
    for path in (run_dir / "experts/blocks.0.ffn.experts").iterdir():
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"blocks.0.ffn.experts/0000\d.safetensors"):
        logits_of(trained)


def test_interrupted_writing_goes_on_where_it_ended(run_dir: Path, world: World, monkeypatch) -> None:
    truth, read, count = logits_of(loaded(run_dir, world, None)), Source.read, 0

    def read_some(self, form, name, *, expert):
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(28, "No space left on device")
        return read(self, form, name, expert=expert)

    monkeypatch.setattr(Source, "read", read_some)
    with pytest.raises(CheckpointError, match="No space left"):
        loaded(run_dir, world, 2)
    records = run_dir / "experts"
    before = times_of(records)
    assert len(before) == 9 and not (records / INDEX).exists()
    assert len(list(records.rglob("*.partial"))) == 1
    monkeypatch.setattr(Source, "read", read)
    assert torch.equal(logits_of(loaded(run_dir, world, 2)), truth)
    after = times_of(records)
    assert len(after) == 16 and {name: after[name] for name in before} == before
    assert not list(records.rglob("*.partial"))


def test_folders_that_cannot_be_ours_are_refused(run_dir: Path, world: World, tmp_path: Path) -> None:
    other, plain, busy = tmp_path / "other", tmp_path / "plain", tmp_path / "busy"
    for folder in (other, busy):
        folder.mkdir()
    (other / "thesis.tex").touch()
    plain.touch()
    with pytest.raises(CheckpointError, match=r"inference.offload.folder.*holds other files: thesis.tex"):
        loaded(run_dir, world, 1, records=other)
    for folder in (plain, plain / "below"):
        with pytest.raises(CheckpointError, match=r"inference.offload.folder.*cannot be written"):
            loaded(run_dir, world, 1, records=folder)
    with (busy / CLAIM).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="written by another process"):
            loaded(run_dir, world, 1, records=busy)
    assert loaded(run_dir, world, 1, records=busy).offloaded is not None


def test_a_folder_without_permission_is_refused(run_dir: Path, world: World, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=r"cannot be written: Permission denied"):
        loaded(run_dir, world, 1, records=folder / "experts")


def test_a_disk_without_room_is_refused_before_anything_is_written(run_dir: Path, world: World, monkeypatch) -> None:
    usage = folder_module.shutil.disk_usage(run_dir)._replace(free=1000)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"GiB free"):
        loaded(run_dir, world, 1)
    assert times_of(run_dir / "experts") == {}


@pytest.mark.parametrize(
    ("keys", "rule"),
    [(["model.ffn.num_experts=0"], "this model has none"), (["model.ffn.graph.expert=ffn"], "coupled by a graph")],
)
def test_models_without_routed_experts_are_refused_with_all_else(world, tmp_path, keys, rule) -> None:
    save_run(tmp_path, world, *keys)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, world, 1, ep=3)
    assert {problem.key for problem in caught.value.problems} == {"parallel.ep", "inference.offload"}
    (own,) = [problem for problem in caught.value.problems if problem.key == "inference.offload"]
    assert rule in own.rule
