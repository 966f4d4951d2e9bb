"""A run goes on only as the run it was."""

import pytest

from moe_train.checkpoint.compatibility import check_compatible
from moe_train.errors import CheckpointError

SAVED = {"seed": 0, "tokenizer": "a1", "model": {"dim": 64, "ffn": {"top_k": 2, "every": 1}}, "seq_len": 128}


def test_equal_identities_pass() -> None:
    check_compatible(SAVED, SAVED, allow=())


def test_a_tuple_equals_the_list_that_json_made_of_it() -> None:
    check_compatible({"shape": [1, 2]}, {"shape": (1, 2)}, allow=())


def test_each_difference_is_listed_old_to_new() -> None:
    now = SAVED | {"seed": 1, "model": {"dim": 64, "ffn": {"top_k": 4}}, "precision": "bf16"}
    with pytest.raises(CheckpointError) as caught:
        check_compatible(SAVED, now, allow=())
    lines = [str(problem) for problem in caught.value.problems]
    assert [line.split(";")[0] for line in lines] == [
        "model.ffn.every: differs from the checkpoint: 1 -> (absent)",
        "model.ffn.top_k: differs from the checkpoint: 2 -> 4",
        "precision: differs from the checkpoint: (absent) -> bf16",
        "seed: differs from the checkpoint: 0 -> 1",
    ]
    assert all("run.name" in line and "checkpoint.resume=never" in line for line in lines)


def test_allowed_names_may_differ_with_all_below_them() -> None:
    now = SAVED | {"seed": 1, "model": {"dim": 32, "ffn": {"top_k": 4, "every": 1}}, "seq_len": 64}
    with pytest.raises(CheckpointError) as caught:
        check_compatible(SAVED, now, allow=("seed", "model.ffn", "seq"))
    assert [problem.key for problem in caught.value.problems] == ["model.dim", "seq_len"]
