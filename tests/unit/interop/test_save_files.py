"""Writing a model: which file holds what, what the files hold, and what a failure leaves behind."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_model import SHARDED, E, expected, held, public_tensors, whole
from safetensors import safe_open
from safetensors.torch import load_file

from moe_train.errors import CheckpointError, Problem
from moe_train.interop import save
from moe_train.interop.folder import PublicFolder
from moe_train.interop.load import fill
from moe_train.interop.plan import plan_files
from moe_train.interop.save import write
from moe_train.interop.target import appearing, free_problems

FP32 = dict.fromkeys(public_tensors(whole()), torch.float32)


def files_of(ep, shard_bytes, dtypes=FP32):
    return plan_files(expected().parts, expected().constants, SHARDED, ep, dtypes, shard_bytes)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3000))
def test_every_tensor_is_planned_once_in_a_file_of_its_holder(ep, shard_bytes):
    files = files_of(ep, shard_bytes)
    tensors = [tensor for file in files for tensor in file.tensors]
    assert sorted(tensor.name for tensor in tensors) == sorted(public_tensors(whole()))
    for file in files:
        assert len({(tensor.writer, tensor.is_pooled) for tensor in file.tensors}) == 1
        assert len(file.tensors) == 1 or sum(tensor.size_bytes for tensor in file.tensors) <= shard_bytes
    for tensor in tensors:
        expert = int(tensor.name.split(".")[1]) if tensor.name.startswith("experts.") else None
        assert tensor.writer == (0 if expert is None else expert // (E // ep))
        assert tensor.is_pooled == (tensor.name == "packed" and ep > 1)
    total = len(files)
    wanted = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    assert [file.name for file in files] == (wanted if total > 1 else ["model.safetensors"])


def test_small_models_are_one_file_and_limits_are_used_up():
    assert len(files_of(1, 10**9)) == 1
    sizes = [sum(tensor.size_bytes for tensor in file.tensors) for file in files_of(1, 1000)]
    assert all(a + b > 1000 for a, b in itertools.pairwise(sizes))


@settings(max_examples=20, deadline=None)
@given(shard_bytes=st.integers(1, 6000), seed=st.integers(0, 1000))
def test_what_is_written_is_what_the_library_writes_and_comes_back(tmp_path_factory, world, mesh, shard_bytes, seed):
    truth, folder = whole(seed), tmp_path_factory.mktemp("written")
    written = write(held(truth), expected(), folder, mesh, world, torch.float32, shard_bytes)
    wanted = public_tensors(truth)
    found = {name: tensor for file in written.files for name, tensor in load_file(folder / file).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert written.total_bytes == sum(tensor.nbytes for tensor in wanted.values())
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(written.files)
    if len(written.files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == written.total_bytes
        assert index["weight_map"] == {
            name: file
            for file in written.files
            for name in safe_open(folder / file, "pt").keys()  # noqa: SIM118
        }
    assert all(safe_open(folder / file, "pt").metadata() == {"format": "pt"} for file in written.files)
    (folder / "config.json").write_text("{}")
    again = held({name: torch.full_like(tensor, torch.nan) for name, tensor in truth.items()})
    fill(again, expected(), PublicFolder.open(folder), world)
    assert all(torch.equal(again.tensors[name], truth[name]) for name in truth)


def test_weights_are_rounded_but_the_bias_of_balancing_is_not(tmp_path, world, mesh):
    truth = whole()
    write(held(truth), expected(), tmp_path, mesh, world, torch.bfloat16, 10**9)
    found = load_file(tmp_path / "model.safetensors")
    wanted = public_tensors(truth)
    assert torch.equal(found.pop("gate.e_score_correction_bias"), wanted["gate.e_score_correction_bias"])
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name


def test_tensors_of_odd_sizes_are_aligned(tmp_path, world, mesh):
    """bf16 tensors of an odd number of values stand behind those of fp32."""
    dtypes = FP32 | {name: torch.bfloat16 for name in FP32 if "proj" in name or "embed" in name}
    for file in files_of(1, 10**9, dtypes):
        sizes = [tensor.dtype.itemsize for tensor in file.tensors]
        assert sizes == sorted(sizes, reverse=True) and set(sizes) == {2, 4}
    assert len(save.header(files_of(1, 10**9)[0].tensors)) % 8 == 0


def test_a_table_that_leaves_a_hole_in_a_public_tensor_is_a_fault_of_the_program(tmp_path, world, mesh):
    parts = dict(expected().parts) | {"packed": expected().parts["packed"][:-1]}
    table = replace(expected(), parts=parts)
    with pytest.raises(AssertionError, match="parts give 210 of the 240 values of packed"):
        write(held(whole()), table, tmp_path, mesh, world, torch.float32, 100)


class TestTarget:
    def test_a_folder_appears_whole(self, tmp_path, world):
        to = tmp_path / "deep" / "to"
        with appearing(to, world) as folder:
            (folder / "file").write_text("x")
            assert not to.exists() and folder.parent == to.parent and folder.name.startswith("to.partial-")
        assert [path.name for path in to.parent.iterdir()] == ["to"] and (to / "file").read_text() == "x"

    def test_an_empty_folder_is_replaced(self, tmp_path, world):
        (tmp_path / "to").mkdir()
        with appearing(tmp_path / "to", world) as folder:
            (folder / "file").write_text("x")
        assert (tmp_path / "to" / "file").exists()

    @pytest.mark.parametrize("error", [CheckpointError, KeyboardInterrupt])
    def test_a_failure_leaves_nothing(self, tmp_path, world, error):
        with pytest.raises(error), appearing(tmp_path / "to", world) as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError(Problem("to", 1, "a", "b"))
        assert list(tmp_path.iterdir()) == []

    def test_a_taken_target_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("x")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("x")
        (tmp_path / "empty").mkdir()
        for name, words in {"file": "is a file", "full": "something in it", "file/below": "is a file"}.items():
            (problem,) = free_problems(tmp_path / name)
            assert words in problem.rule
        assert free_problems(tmp_path / "empty") == free_problems(tmp_path / "a" / "b") == []


def test_a_full_disk_fails_the_export_and_leaves_nothing(tmp_path, world, mesh, monkeypatch):
    def full(file, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_append", full)
    with pytest.raises(CheckpointError, match="No space left"), appearing(tmp_path / "to", world) as folder:
        write(held(whole()), expected(), folder, mesh, world, torch.float32, 1000)
    assert list(tmp_path.iterdir()) == []
