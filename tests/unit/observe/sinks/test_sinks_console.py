import io
import re

import pytest

from moe_train.config.schema import TrainConfig
from moe_train.observe.sinks import ConsoleSink, RunContext
from moe_train.observe.sinks.lines import count, duration

RECORD = {
    "kind": "train",
    "step": 120,
    "loss": 3.4119,
    "grad_norm": 0.8122,
    "lr": 3e-4,
    "tokens": 983_040,
    "tokens_per_s": 41_234.0,
    "step_ms": 200.0,
    "data_wait_ms": 4.0,
    "exchange_ms": 30.0,
    "memory_gib": 9.51,
    "mfu": 0.314,
    "moe/layer_00/load": [0.295, 0.205, 0.25, 0.25],
    "moe/layer_00/dropped_fraction": 0.004,
    "moe/layer_00/dead_experts": 0,
    "moe/layer_00/entropy": 1.2,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def started(stream, tmp_path, start_step=0, clock=None, name="demo", graph=None, **sections):
    model = {"ffn": {"graph": graph}, **sections}
    config = TrainConfig.model_validate({"run": {"name": name}, "train": {"steps": 1000}, "model": model})
    sink = ConsoleSink(stream, clock or Clock())
    sink.start(RunContext(tmp_path, config, start_step))
    return sink


def lines_after_header(stream):
    return stream.getvalue().splitlines()[2:]


def test_the_line_of_a_train_record(tmp_path):
    stream = io.StringIO()
    started(stream, tmp_path).write(RECORD)
    assert lines_after_header(stream) == [
        "step 120/1000 12% | loss 3.412 (ema 3.41) | gnorm 0.81 | lr 3.0e-04 | 41.2k tok/s | mfu 31% | mem 9.5G | "
        "data 2% | imb 1.18 dead 0 drop 0.4% | eta -"
    ]


def test_the_line_of_coupled_experts(tmp_path, coupled_record):
    stream = io.StringIO()
    started(stream, tmp_path).write(coupled_record)
    (line,) = lines_after_header(stream)
    assert line.endswith("| data - | sim 0.50 rank 2.50 msg 0.50 | eta -")


def test_the_line_of_several_parts_of_a_block(tmp_path, parts_record):
    stream = io.StringIO()
    started(stream, tmp_path).write(parts_record)
    (line,) = lines_after_header(stream)
    told = "imb 1.00 dead 0 drop 50.0% | attn 4.00 dead 5 | passed 12.5% causal 12.5% agree 75%"
    assert line.endswith(f"| data - | {told} | eta -")


def test_the_legend_explains_the_parts_that_the_run_has(tmp_path):
    stream = io.StringIO()
    started(stream, tmp_path, attention={"kind": "switchhead"}, depth={"kind": "mixture_of_depths"})
    words = re.findall(r"(\S+):", stream.getvalue().splitlines()[1])
    assert words[-6:] == ["imb", "drop", "attn", "passed", "causal", "agree"]


def test_the_status_names_the_worst_part_of_each_kind(tmp_path, monkeypatch, parts_record):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    sink = started(stream, tmp_path)
    sink.write(parts_record)
    sink.close("finished")
    shown = stream.getvalue()
    assert "attention: attn 4.00 dead 5   worst layer 3, values" in shown
    assert "depth: passed 12.5% causal 12.5% agree 75%   worst layer 1, depth" in shown


def test_an_evaluation_shows_the_loss_that_looks_ahead_beside_the_causal_one(tmp_path):
    stream = io.StringIO()
    record = {"kind": "eval", "step": 100, "loss": 3.2, "loss_looking_ahead": 2.9, "perplexity": 24.53}
    started(stream, tmp_path).write(record)
    assert lines_after_header(stream) == ["eval step 100 | loss 3.200 (looking ahead 2.900) | perplexity 24.53"]


def test_coupled_experts_without_messages(tmp_path, coupled_record):
    stream = io.StringIO()
    silent = {key: value for key, value in coupled_record.items() if "adjacency" not in key}
    started(stream, tmp_path).write({key: [] if "message" in key else value for key, value in silent.items()})
    assert lines_after_header(stream)[0].endswith("| sim 0.50 rank 2.50 msg - | eta -")


def test_the_legend_explains_the_fields_that_the_run_has(tmp_path):
    routed, coupled = io.StringIO(), io.StringIO()
    started(routed, tmp_path)
    started(coupled, tmp_path, graph={})
    legends = [stream.getvalue().splitlines()[1] for stream in (routed, coupled)]
    assert [re.findall(r"(\S+):", legend)[-2:] for legend in legends] == [["imb", "drop"], ["rank", "msg"]]
    assert "imb" not in legends[1]


def test_new_figures_of_routing_do_not_lengthen_the_line(tmp_path):
    causes = {f"moe/layer_00/{name}": 0.2 for name in ("dropped_capacity_fraction", "rerouted_fraction", "bias_range")}
    plain, rich = io.StringIO(), io.StringIO()
    started(plain, tmp_path).write(RECORD)
    started(rich, tmp_path).write(RECORD | causes | {"importance_loss": 0.5, "device_loss": 1.0})
    assert rich.getvalue() == plain.getvalue()


def test_what_is_unknown_is_a_dash_and_a_dense_model_has_no_expert_fields(tmp_path):
    stream = io.StringIO()
    started(stream, tmp_path).write({"kind": "train", "step": 1, "loss": float("nan"), "mfu": None})
    assert lines_after_header(stream) == [
        "step 1/1000 0% | loss - (ema -) | gnorm - | lr - | - tok/s | mfu - | mem -G | data - | eta -"
    ]


def test_time_left_excludes_the_first_interval_and_the_steps_of_earlier_lives(tmp_path):
    stream, clock = io.StringIO(), Clock()
    sink = started(stream, tmp_path, start_step=500, clock=clock)
    clock.now += 300  # a slow start
    sink.write({**RECORD, "step": 510})
    clock.now += 20
    sink.write({**RECORD, "step": 520})
    first, second = lines_after_header(stream)
    assert first.endswith("| eta -")
    assert second.endswith("| eta 16m")  # 480 steps at 2 s


def test_lines_of_eval_and_event(tmp_path):
    stream = io.StringIO()
    sink = started(stream, tmp_path)
    sink.write({"kind": "eval", "step": 100, "loss": 3.2, "perplexity": 24.53})
    sink.write({"kind": "eval", "step": 100, "loss": 3.2, "bits_per_byte": 2.2, "unigram_bits_per_byte": 4.71})
    sink.write({"kind": "event", "step": 100, "event": "saved", "message": "checkpoints/step_00000100"})
    assert lines_after_header(stream) == [
        "eval step 100 | loss 3.200 | perplexity 24.53",
        "eval step 100 | loss 3.200 | perplexity - | 2.200 bits/byte (unigram 4.710)",
        "event step 100 | saved | checkpoints/step_00000100",
    ]


def test_off_a_terminal_there_are_no_control_characters(tmp_path):
    stream = io.StringIO()
    sink = started(stream, tmp_path, name="evil\x1b[31m\rname")
    sink.write(RECORD)
    sink.write({"kind": "event", "step": 1, "event": "x\x07", "message": "a\x1b[2Jb\nc\r\u2028d"})
    sink.close("finished")
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028]", stream.getvalue()) is None
    assert len(lines_after_header(stream)) == 2


def test_on_a_terminal_lines_stay_and_the_status_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    sink = started(stream, tmp_path)
    sink.write(RECORD)
    sink.write({"kind": "event", "step": 120, "event": "saved", "message": "[bold]not markup[/bold]"})
    sink.close("finished")
    sink.close("finished")
    shown = stream.getvalue()
    assert "step 120/1000 12% | loss 3.412" in shown
    assert "[bold]not markup[/bold]" in shown
    assert "worst layer 0" in shown  # the status was there
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # and gave the cursor back


def test_the_status_names_the_layer_whose_experts_are_most_alike(tmp_path, monkeypatch, coupled_record):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    sink = started(stream, tmp_path)
    sink.write(coupled_record)
    sink.close("finished")
    assert "experts: sim 0.50 rank 2.50 msg 0.50   worst layer 3" in stream.getvalue()


def test_a_resumed_run_shows_where_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    started(stream, tmp_path, start_step=500).close("interrupted")
    assert "step 500/1000 50%" in stream.getvalue()
    assert "waiting for the first record" in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    sink = started(stream, tmp_path)
    sink.write(RECORD)
    sink.close("finished")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (599.7, "10m"),
        (840, "14m"),
        (3599, "1h00m"),
        (7500, "2h05m"),
        (86_399, "1d00h"),
        (273_600, "3d04h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (999, "999"), (41_234, "41.2k"), (1.25e6, "1.25M"), (46.7e9, "46.7G")]
)
def test_counts(value, text):
    assert count(value) == text
