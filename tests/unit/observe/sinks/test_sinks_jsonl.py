import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.schema import TrainConfig
from moe_train.observe.records import to_json
from moe_train.observe.sinks import JsonlSink, RunContext
from moe_train.observe.sinks.jsonl import forget_after


def open_sink(run_dir, start_step=0):
    sink = JsonlSink()
    sink.start(RunContext(run_dir, TrainConfig(), start_step))
    return sink


def lines_of(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_each_record_is_in_the_file_before_the_next(tmp_path):
    sink = open_sink(tmp_path / "new" / "run")
    for step in (1, 2, 3):
        sink.write({"kind": "train", "step": step, "loss": 1.0})
        assert len(lines_of(tmp_path / "new" / "run")) == step  # read while the file is open
    sink.close("finished")


def test_what_is_not_finite_is_null(tmp_path):
    sink = open_sink(tmp_path)
    sink.write({"kind": "train", "step": 1, "loss": float("nan"), "moe/layer_00/load": [float("inf"), 0.5]})
    sink.close("failed")
    assert json.loads(lines_of(tmp_path)[0]) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "moe/layer_00/load": [None, 0.5],
    }


def test_a_resumed_run_measures_lost_steps_again_and_keeps_its_history(tmp_path):
    first = open_sink(tmp_path)
    for step in (10, 20, 30):
        first.write({"kind": "train", "step": step, "loss": 1.0})
        first.write({"kind": "eval", "step": step, "loss": 1.0})
    first.write({"kind": "event", "step": 30, "event": "interrupted"})
    first.close("interrupted")
    second = open_sink(tmp_path, start_step=20)
    second.write({"kind": "train", "step": 30, "loss": 2.0})
    second.close("finished")
    rows = [(r["kind"], r["step"], r.get("loss")) for r in map(json.loads, lines_of(tmp_path))]
    assert rows == [
        ("train", 10, 1.0),
        ("eval", 10, 1.0),
        ("train", 20, 1.0),
        ("eval", 20, 1.0),
        ("event", 30, None),
        ("train", 30, 2.0),
    ]


records = st.fixed_dictionaries({"kind": st.sampled_from(["train", "eval", "event"]), "step": st.integers(0, 9)})


@given(st.lists(records, max_size=12), st.integers(0, 9), st.data())
def test_a_file_torn_anywhere_resumes(tmp_path_factory, rows, step, data):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    text = "".join(to_json(row) + "\n" for row in rows)
    torn = text[: data.draw(st.integers(0, len(text)))]
    path.write_text(torn)
    forget_after(path, step)
    whole = [
        row
        for index, row in enumerate(rows)
        if len("".join(to_json(r) + "\n" for r in rows[: index + 1])) - 1 <= len(torn)
    ]
    expected = [row for row in whole if row["kind"] == "event" or row["step"] <= step]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    assert path.read_text() == "" or path.read_text().endswith("\n")
    assert list(path.parent.iterdir()) == [path]


def test_bytes_that_are_no_text_are_dropped_like_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe\x00{"ki')
    forget_after(tmp_path / "metrics.jsonl", step=5)
    assert lines_of(tmp_path) == ['{"kind": "train", "step": 1}']


def test_a_file_with_nothing_to_drop_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')
    before = path.stat().st_ino
    forget_after(path, step=1)
    assert path.stat().st_ino == before


def test_close_is_safe_in_every_state(tmp_path):
    JsonlSink().close("failed")
    sink = open_sink(tmp_path)
    sink.close("finished")
    sink.close("finished")
    with pytest.raises(AssertionError, match="before start"):
        sink.write({"kind": "train", "step": 1})
