import json
import math

import numpy as np
import pytest

from moe_train.observe.report import RunRecord
from moe_train.observe.report.summary import tiles


def written(tmp_path, *records, tail=""):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return RunRecord.load(tmp_path)


def test_an_empty_folder_is_an_empty_run(tmp_path):
    run = RunRecord.load(tmp_path)
    assert (run.train, run.evals, run.events, run.samples, run.layers) == ([], [], [], [], [])
    assert run.name == tmp_path.name
    assert not run.train_series("loss")


def test_damaged_files_count_as_empty(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1, 2\nb: }")
    (tmp_path / "environment.json").write_text('{"host": "x"')
    run = written(tmp_path, {"kind": "train", "step": 1, "loss": 1.0}, tail='{"kind": "train", "st')
    assert (run.config, run.environment, len(run.train), run.unreadable_lines) == ({}, {}, 1, 1)


def test_of_two_lives_the_later_counts_and_steps_ascend(tmp_path):
    run = written(
        tmp_path,
        {"kind": "train", "step": 20, "loss": 2.0},
        {"kind": "train", "step": 10, "loss": 3.0},
        {"kind": "train", "step": 20, "loss": 1.0},
        {"kind": "train", "step": 30, "loss": None},
    )
    loss = run.train_series("loss")
    assert loss.steps.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(loss.values, [3.0, 1.0, math.nan])


def test_loads_are_one_row_per_step_and_keep_the_last_shape(tmp_path):
    key = "moe/layer_01/load"
    run = written(
        tmp_path,
        {"kind": "train", "step": 1, key: [1.0]},
        {"kind": "train", "step": 2, key: [0.75, 0.25]},
        {"kind": "train", "step": 3, key: None},
        {"kind": "train", "step": 4, key: [0.5, None]},
    )
    steps, loads = run.loads("layer_01")
    assert steps.tolist() == [2, 4]
    np.testing.assert_array_equal(loads, [[0.75, 0.25], [0.5, math.nan]])


def test_layers_of_both_kinds(tmp_path):
    keys = {"moe/layer_03/load": None, "moe/layer_01/similarity": 0.5, "moe/layer_01/cosines": []}
    run = written(tmp_path, {"kind": "train", "step": 1, **keys}, {"kind": "train", "step": 2})
    assert (run.layers, run.routed_layers, run.graph_layers) == (["layer_01", "layer_03"], ["layer_03"], ["layer_01"])


TORN = [None, 1.0, "x", [], [[]], [[1.0, 2.0]], [[1.0], [2.0, 3.0]], [[None]], [[[1.0]], [[1.0, 2.0]]], [[[[1.0]]]]]


def test_the_first_and_the_last_matrices_of_the_last_shape(tmp_path):
    key = "moe/layer_00/adjacency"
    stacks = [[[[0.0]]], [[[0.0, 0.1], [0.2, None]]], [[[0.0, 0.3], [0.4, "x"]]], [[[0.0, 0.5], [0.6, 0.0]]]]
    values = [*TORN, stacks[0], *TORN, *stacks[1:], *TORN]
    run = written(tmp_path, *({"kind": "train", "step": step, key: value} for step, value in enumerate(values)))
    first, last = run.first_and_last("layer_00", "adjacency")
    assert (first.step, last.step) == (21, 23)
    np.testing.assert_array_equal(first.values, [[[0.0, 0.1], [0.2, math.nan]]])
    np.testing.assert_array_equal(last.values, stacks[3])
    assert run.first_and_last("layer_01", "adjacency") is None


def test_one_matrix_is_a_stack_of_one_and_one_record_is_first_and_last(tmp_path):
    run = written(tmp_path, {"kind": "train", "step": 7, "moe/layer_00/cosines": [[1.0, 0.5], [0.5, 1.0]]})
    first, last = run.first_and_last("layer_00", "cosines")
    assert first.step == last.step == 7
    np.testing.assert_array_equal(last.values, [[[1.0, 0.5], [0.5, 1.0]]])


@pytest.mark.parametrize("value", TORN)
def test_what_is_no_matrix_is_not_found(value, tmp_path):
    run = written(tmp_path, {"kind": "train", "step": 1, "moe/layer_00/cosines": value})
    assert run.first_and_last("layer_00", "cosines") is None


def test_settings_are_found_by_dotted_path(make_run):
    run = RunRecord.load(make_run())
    assert run.setting("train.steps") == 400
    assert run.setting("train.steps.deeper") is None and run.setting("no.such") is None


def test_the_card_says_what_the_run_reached(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 40}")
    rows = [{"kind": "train", "step": s, "step_ms": 500.0, "tokens": s * 100, "tokens_per_s": 200.0} for s in (10, 30)]
    score = {"loss": 3.0, "perplexity": 20.1, "bits_per_byte": 2.0, "unigram_bits_per_byte": 4.5}
    run = written(
        tmp_path,
        {"kind": "event", "step": 0, "event": "started", "parameters": 11_400_000, "active_parameters": 4_100_000},
        *rows,
        {"kind": "eval", "step": 30, **score},
        {"kind": "eval", "step": 40, "loss": None},
    )
    card = {tile.label: (tile.value, tile.note) for tile in tiles(run)}
    assert card == {
        "Held-out loss": ("3.000", "nats per token at step 30; perplexity 20.1"),
        "Bits per byte": ("2.000", "a unigram model needs 4.500"),
        "Steps": ("40", "complete"),
        "Tokens": ("3k", "200 per second (median)"),
        "Time in steps": ("15s", "without start, evaluation and saving"),
        "Parameters": ("11.4M", "4.1M active per token"),
    }


def test_an_empty_run_has_an_empty_card(tmp_path):
    assert tiles(RunRecord.load(tmp_path)) == []
