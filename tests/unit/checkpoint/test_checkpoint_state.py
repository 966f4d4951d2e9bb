"""What a checkpoint gives back, and what it refuses to give."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import Lone, parts, zeros_like
from part_samples import values_of

from moe_train.checkpoint.manifest import METADATA, read_manifest, record_of
from moe_train.checkpoint.metadata import read_metadata
from moe_train.checkpoint.reader import Checkpoint, open_checkpoint
from moe_train.checkpoint.state import CheckpointState
from moe_train.errors import CheckpointError

StateAt = Callable[[int], CheckpointState]


def saved(lone: Lone, folder: Path, state: CheckpointState) -> Checkpoint:
    return open_checkpoint(lone.manager(folder).save(7, state), lone.world)


def test_everything_comes_back_in_place(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    state = state_at(7)
    found = saved(lone, tmp_path, state)
    assert (found.step, found.trainer, found.random) == (7, {"step": 7, "tokens": 70}, b"random 7")
    filled = zeros_like(state)
    addresses = {key: tensor.data_ptr() for key, tensor in filled.items()}
    found.fill(parts(filled))
    for key, tensor in values_of(state.parts).items():
        assert torch.equal(filled[key], tensor), key
        assert filled[key].data_ptr() == addresses[key], key


def test_parameters_that_require_gradients_are_filled(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    state = state_at(7)
    parameter = torch.nn.Parameter(torch.zeros(5, 3))
    tensors = zeros_like(state) | {"model.embed": parameter}
    saved(lone, tmp_path, state).fill(parts(tensors))
    assert torch.equal(parameter, values_of(state.parts)["model.embed"])
    assert parameter.requires_grad


def test_the_model_alone_can_be_asked_for(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    state = state_at(7)
    model = {key: tensor for key, tensor in zeros_like(state).items() if key.startswith("model.")}
    saved(lone, tmp_path, state).fill(parts(model))
    assert all(torch.equal(tensor, values_of(state.parts)[key]) for key, tensor in model.items())


def test_each_difference_is_listed_and_nothing_is_overwritten(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    state = state_at(7)
    tensors = zeros_like(state)
    tensors["model.experts.w"] = torch.zeros(8, 3, 2, dtype=torch.float64)
    del tensors["optim.experts.w.step"]
    tensors["model.head"] = torch.zeros(2)
    with pytest.raises(CheckpointError) as caught:
        saved(lone, tmp_path, state).fill(parts(tensors))
    assert [str(problem).split(";")[0] for problem in caught.value.problems] == [
        "model.experts.w: has shape (4, 3, 2) in the checkpoint, not (8, 3, 2)",
        "model.head: is missing in the checkpoint",
        "optim.experts.w.step: is unexpected: the checkpoint has ()",
    ]
    assert not any(tensor.any() for tensor in tensors.values())


def test_a_rank_that_did_not_exist_gets_no_random_state(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    state = state_at(7)
    found = saved(lone, tmp_path, CheckpointState(state.parts, state.trainer, None))
    assert found.random is None


class Payload:
    """Makes a file when it is unpickled by a careless reader."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_metadata_with_a_payload_does_not_run_even_when_the_manifest_is_forged(
    lone: Lone, tmp_path: Path, state_at: StateAt
) -> None:
    state = state_at(7)
    folder = saved(lone, tmp_path, state).path
    (folder / METADATA).write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    manifest = read_manifest(folder)
    forged = manifest.model_copy(update={"files": manifest.files | {METADATA: record_of(folder / METADATA)}})
    (folder / "manifest.json").write_text(forged.render())
    found = open_checkpoint(folder, lone.world)
    with pytest.raises(CheckpointError, match="which no checkpoint of tensors needs"):
        found.fill(parts(zeros_like(state)))
    assert not (tmp_path / "canary").exists()


def test_metadata_may_only_point_at_files_with_a_hash(lone: Lone, tmp_path: Path, state_at: StateAt) -> None:
    found = saved(lone, tmp_path, state_at(7))
    others = {name: record for name, record in found.manifest.files.items() if not name.endswith(".distcp")}
    with pytest.raises(CheckpointError, match=r"does not list: __0_0\.distcp"):
        read_metadata(found.path, found.manifest.model_copy(update={"files": others}))


def test_every_number_format_passes_the_restricted_reader(lone: Lone, tmp_path: Path) -> None:
    formats = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
    tensors = {f"model.{dtype}": torch.ones(2).to(dtype) for dtype in formats}
    filled = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    saved(lone, tmp_path, CheckpointState(parts(tensors), {}, None)).fill(parts(filled))
    assert all(torch.equal(filled[key], tensors[key]) for key in tensors)
