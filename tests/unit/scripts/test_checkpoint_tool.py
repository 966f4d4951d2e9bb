"""The tool that looks into checkpoints: what it shows, what it writes, what it compares, and how it refuses."""

import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe_train.checkpoint import merge as merge_module
from moe_train.checkpoint import whole
from moe_train.checkpoint.manager import CheckpointManager
from moe_train.checkpoint.state import CheckpointState
from moe_train.dist.mesh import build_mesh
from moe_train.dist.parts import Part
from moe_train.dist.world import World, joined

SCRIPT = Path(__file__).parents[3] / "scripts/checkpoint.py"
ORDER = [2, 0, 3, 1]
LAYOUT = {"world_size": 4, "ep": 2, "dp_shard": 2, "engine": "torch", "zero_stage": 0, "placement": [[2, 0, 3, 1]]}
Tool = Callable[..., tuple[int, str, str]]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"model.blocks.{layer}.experts.w": torch.randn(4, 3, 2, generator=generator) for layer in (0, 1, 10)}
    made |= {f"optim{key[5:]}.exp_avg": value * 2 for key, value in made.items()}
    made |= {"model.head": torch.randn(3, 5, generator=generator).bfloat16(), "optim.head.step": torch.tensor(7.0)}
    return made | {"model.count": torch.arange(5), "model.none": torch.zeros(0, 3), "model.mask": torch.tensor([True])}


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("checkpoint_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Tool:
    def call(*words: object) -> tuple[int, str, str]:
        status = tool.main([str(word) for word in words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, whose experts lie in pieces."""
    folder = tmp_path_factory.mktemp("run")
    world = World(0, 1, torch.device("cpu"), 30.0)
    with joined(dist.HashStore(), world):
        manager = CheckpointManager(folder / "checkpoints", world, build_mesh(world, 1).layout, keep=2)
        for step in (7, 9):
            parts = {
                key: Part.of_experts(value[ORDER], ORDER, 4) if "experts" in key else Part.whole(value)
                for key, value in tensors().items()
            }
            manager.save(step, CheckpointState(parts, {"step": step, "tokens": 70, "layout": LAYOUT}, b"random"))
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """One to damage."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in (saved / "checkpoints/step_00000009").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def line(text: str, start: str) -> list[str]:
    return next(row.split() for row in text.splitlines() if row.strip().startswith(start))


def test_a_checkpoint_is_shown(run: Tool, saved: Path) -> None:
    status, shown, _ = run("inspect", saved / "checkpoints/step_00000007")
    assert status == 0
    assert shown.startswith(f"{saved / 'checkpoints/step_00000007'}: intact\nstep 7, written by world_size 4, ep 2, ")
    assert "dp_shard 2, engine torch, zero_stage 0, placement [[2, 0, 3, 1]]" in shown
    assert line(shown, "tokens") == ["tokens", "70"]
    shard = saved / "checkpoints/step_00000007/__0_0.distcp"
    assert line(shown, shard.name) == [shard.name, f"{shard.stat().st_size:,}", "verified"]
    assert line(shown, "model  (all)")[2:] == ["6", str(24 * 3 + 15 + 5 + 1), str(24 * 3 * 4 + 30 + 40 + 1), *FORMATS]
    assert line(shown, "model  blocks.10")[1:] == ["blocks.10", "1", "24", "96", "float32"]
    assert shown.index("blocks.1 ") < shown.index("blocks.10"), "layers in the order of their numbers"
    assert "model.blocks.10.experts.w" not in shown


FORMATS = ["bfloat16", "bool", "float32", "int64"]


def test_every_tensor_is_shown_when_asked(run: Tool, saved: Path) -> None:
    _, shown, _ = run("inspect", saved / "checkpoints/step_00000007", "--tensors")
    assert line(shown, "model.head") == ["model.head", "(3,", "5)", "bfloat16", "30"]
    assert line(shown, "optim.head.step") == ["optim.head.step", "()", "float32", "4"]


def test_all_checkpoints_of_a_run_are_shown(run: Tool, saved: Path) -> None:
    _, shown, _ = run("inspect", saved)
    assert [row.split("/")[-1] for row in shown.splitlines() if row.endswith("intact")] == [
        "step_00000007: intact", "step_00000009: intact",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json", "random_00000.bin", "manifest.json"])
@pytest.mark.parametrize("command", ["inspect", "merge", "diff"])
def test_damage_is_named_and_nothing_is_made_of_it(
    run: Tool, saved: Path, copied: Path, name: str, command: str
) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    output = copied.parent / "merged.safetensors"
    words = {"inspect": [copied], "merge": [copied, output], "diff": [saved, copied]}
    status, shown, errors = run(command, *words[command])
    assert status == (1 if command == "inspect" else 2)
    assert name in (shown if command == "inspect" else errors)
    if command == "inspect":
        assert "DAMAGED" in shown.splitlines()[0]
        assert name == "manifest.json" or line(shown.split("files:")[1], name)[-1] == "damaged"
    assert not output.exists()


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_whole_tensors_are_written_bit_for_bit(run: Tool, saved: Path, tmp_path: Path, with_optimizer: bool) -> None:
    output = tmp_path / "deep/merged.safetensors"
    assert run("merge", saved, output, *["--optimizer"] * with_optimizer)[0] == 0
    found = load_file(output)
    wanted = {key.removeprefix("model."): value for key, value in tensors().items() if value.numel()}
    wanted = {key: value for key, value in wanted.items() if with_optimizer or not key.startswith("optim")}
    assert found.keys() == wanted.keys() and len(found) in (6, 10)
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "9"}
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_files_of_a_largest_size(run: Tool, saved: Path, tmp_path: Path) -> None:
    assert run("merge", saved, tmp_path / "several", "--file-gib", 170 / 2**30)[0] == 0
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    total = 0
    for name in files:
        held = load_file(tmp_path / "several" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= 170
        total += sum(tensor.nbytes for tensor in held.values())
    assert index["metadata"]["total_size"] == total == 24 * 3 * 4 + 30 + 40 + 1


@pytest.mark.parametrize("command", ["merge", "diff"])
def test_one_tensor_is_in_memory_at_a_time(
    run: Tool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Of each of the two that are compared."""
    alive: list[int] = []
    given: list[weakref.ref[Tensor]] = []
    read = whole.Stored.read

    def noting(stored: whole.Stored, tensor: whole.TensorInfo) -> Tensor:
        alive.append(sum(known() is not None for known in given))
        values = read(stored, tensor)
        given.append(weakref.ref(values))
        return values

    monkeypatch.setattr(whole.Stored, "read", noting)
    run(command, saved, tmp_path / "merged.safetensors" if command == "merge" else saved)
    assert alive == ([0] * 6 if command == "merge" else [0, 1] * 10)


def test_an_existing_output_is_kept(run: Tool, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").write_text("precious")
    status, _, errors = run("merge", saved, tmp_path / "merged")
    assert status == 2 and "merged: exists; name another output" in errors
    assert (tmp_path / "merged").read_text() == "precious"


def test_a_failed_merge_leaves_no_file(run: Tool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module.os, "fsync", fail)
    status, _, errors = run("merge", saved, tmp_path / "merged.safetensors")
    assert status == 2 and "No space left" in errors
    assert list(tmp_path.iterdir()) == []


def changed(saved: Path, folder: Path, changes: dict[str, Tensor | None]) -> Path:
    """A checkpoint with some tensors changed, added or (None) left out."""
    world = World(0, 1, torch.device("cpu"), 30.0)
    kept = {key: value for key, value in (tensors() | changes).items() if value is not None}
    with joined(dist.HashStore(), world):
        manager = CheckpointManager(folder, world, build_mesh(world, 1).layout, keep=2)
        return manager.save(9, CheckpointState({key: Part.whole(value) for key, value in kept.items()}, {}, None))


def test_equal_tensors_in_other_pieces_are_equal(run: Tool, saved: Path, tmp_path: Path) -> None:
    status, shown, _ = run("diff", saved, changed(saved, tmp_path, {"model.none": None}))
    assert status == 0 and shown.splitlines()[-1] == "all 10 tensors are equal"


def test_differences_are_listed_with_their_size(run: Tool, saved: Path, tmp_path: Path) -> None:
    weight = tensors()["model.blocks.1.experts.w"]
    weight[2, 1, 0] += 0.5
    nan = tensors()["model.blocks.0.experts.w"]
    nan[0, 0, 0] = torch.nan
    other = changed(
        saved,
        tmp_path,
        {
            "model.blocks.1.experts.w": weight,
            "model.blocks.0.experts.w": nan,
            "model.count": torch.arange(6),
            "model.mask": None,
            "optim.head.step": torch.tensor(8.0),
        },
    )
    status, shown, _ = run("diff", saved, other)
    assert status == 1
    assert [row.strip() for row in shown.splitlines()[2:]] == [
        "model.blocks.0.experts.w differs by up to inf",
        "model.blocks.1.experts.w differs by up to 5.000e-01",
        "model.count has shape (5,) and (6,)",
        f"model.mask is in {saved / 'checkpoints/step_00000009'} only",
        "optim.head.step differs by up to 1.000e+00",
        "5 of 10 tensors differ",
    ]
    status, shown, _ = run("diff", saved, other, "--weights")
    assert status == 1 and shown.splitlines()[-1] == "4 of 6 tensors differ"


def test_values_are_compared_in_pieces_and_what_is_no_number_equals_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "PIECE_VALUES", 4)
    a = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert whole.largest_difference(a, a.clone()) == 0.0
    for place, value, largest in ((8, 5.25, 0.25), (3, -2.0, 2.0), (1, -torch.inf, torch.inf), (0, 1.0, torch.inf)):
        b = a.clone()
        b[place] = value
        assert whole.largest_difference(a, b) == largest, place


def test_what_is_no_checkpoint_is_refused(run: Tool, tmp_path: Path) -> None:
    for words in (["inspect", tmp_path], ["merge", tmp_path / "none", tmp_path / "out"], ["diff", tmp_path, tmp_path]):
        status, _, errors = run(*words)
        assert status == 2 and "holds no checkpoint; give the folder of a checkpoint" in errors


def test_the_script_ends_with_a_message_and_its_status(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, SCRIPT, "inspect", tmp_path], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("checkpoint error: 1 problem") and "Traceback" not in ended.stderr
