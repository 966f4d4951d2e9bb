import errno
import logging

import pytest

from moe_train.config.schema import TrainConfig
from moe_train.observe.sinks import RunContext, SinkGroup, open_sinks

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")
RECORD = {"kind": "train", "step": 1, "loss": 2.0}


class Recorder:
    """A sink that notes what it was told and fails where it is asked to."""

    def __init__(self, name, fails_in=None, error=DISK_FULL):
        self.name, self.fails_in, self.error, self.calls = name, fails_in, error, []

    def _note(self, call):
        self.calls.append(call)
        if self.fails_in == call.split()[0]:
            raise self.error

    def start(self, context):
        self._note("start")

    def write(self, record):
        self._note("write")

    def close(self, status):
        self._note(f"close {status}")


@pytest.fixture
def context(tmp_path):
    config = TrainConfig.model_validate({"log": {"wandb": {"mode": "disabled"}}})
    return RunContext(tmp_path / "run", config, start_step=0)


@pytest.mark.parametrize("method", ["start", "write", "close"])
def test_a_failing_sink_is_named_once_and_the_others_go_on(context, caplog, method):
    bad, good = Recorder("bad", fails_in=method), Recorder("good")
    group = SinkGroup([bad, good])
    group.start(context)
    group.write(RECORD)
    group.write(RECORD)
    group.close("finished")
    assert good.calls == ["start", "write", "write", "close finished"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "bad" in warnings[0] and "No space left on device" in warnings[0]


def test_a_sink_that_failed_is_closed_and_not_written_to_again(context):
    bad = Recorder("bad", fails_in="write")
    group = SinkGroup([bad])
    group.start(context)
    group.write(RECORD)
    group.write(RECORD)
    assert bad.calls == ["start", "write", "close failed"]
    assert group.names == []


def test_the_warning_shows_no_secret(context, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value-9876")
    group = SinkGroup([Recorder("bad", fails_in="start", error=RuntimeError("401 for s3cr3t-value-9876"))])
    group.start(context)
    assert "401" in caplog.text and "s3cr3t" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_the_context_manager_tells_how_the_run_ended(context, error, status):
    sink = Recorder("sink")
    try:
        with SinkGroup([sink]):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert sink.calls == [f"close {status}"]


def test_an_interrupt_is_not_swallowed(context):
    group = SinkGroup([Recorder("sink", fails_in="write", error=KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        group.write(RECORD)


@pytest.mark.parametrize("record", [{"kind": "other", "step": 1}, {"kind": "train"}, {"step": 1}])
def test_a_record_that_is_none_is_a_fault_of_the_caller(record):
    with pytest.raises(AssertionError, match="record"):
        SinkGroup([]).write(record)


def test_only_the_leader_writes(context, capsys):
    with open_sinks(context, is_leader=False) as group:
        group.write(RECORD)
    assert not context.run_dir.exists()
    assert capsys.readouterr().out == ""


def test_the_leader_has_file_and_console(context, capsys):
    with open_sinks(context, is_leader=True) as group:
        assert group.names == ["jsonl", "console"]
        group.write(RECORD)
    assert (context.run_dir / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1, "loss": 2.0}\n'
    assert "step 1/400 0% | loss 2.000" in capsys.readouterr().out
