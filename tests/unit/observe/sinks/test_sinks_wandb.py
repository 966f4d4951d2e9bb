import os
import sys
import time
import types
from pathlib import Path

import pytest

from moe_train.config.schema import TrainConfig
from moe_train.observe.sinks import RunContext, SinkGroup, WandbSink
from moe_train.observe.sinks import wandb as module
from moe_train.observe.sinks.wandb import resolve_mode
from moe_train.observe.sinks.wandb_keys import wandb_values

SECRET = "s3cr3t-value-9876"

TRAIN = {
    "kind": "train",
    "step": 20,
    "loss": 3.0,
    "grad_norm": float("nan"),
    "tokens_per_s": 1000.0,
    "data_wait_ms": 2.0,
    "exchange_ms": 9.0,
    "memory_gib": 1.5,
    "mfu": None,
    "moe/layer_07/load": [0.75, 0.25],
    "moe/layer_07/dropped_fraction": 0.1,
    "moe/layer_07/max_violation": 0.5,
    "moe/layer_07/entropy": 0.6,
    "moe/layer_07/dead_experts": 0,
}


def context(run_dir, start_step=0, **checkpoint):
    config = {"run": {"name": "demo"}, "checkpoint": checkpoint, "data": {"path": f"s3://u:{SECRET}@bucket/x"}}
    return RunContext(run_dir, TrainConfig.model_validate(config), start_step)


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.metrics, self.exit_code = options, [], [], None
        self.settings = types.SimpleNamespace(mode=options["mode"], sync_dir="run/wandb/offline-1")

    def define_metric(self, *arguments, **options):
        self.metrics.append((arguments, options))

    def log(self, values):  # no step=: a call with it is an error here
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeWandb(types.ModuleType):
    """wandb, as far as the sink knows it; ``init`` raises the errors it is given, one after the other."""

    def __init__(self, *errors):
        super().__init__("wandb")
        self.errors, self.runs, self.calls = list(errors), [], []
        self.Settings = lambda **settings: settings

    def setup(self, settings):
        self.calls.append("setup")

    def teardown(self, exit_code):
        self.calls.append("teardown")

    def init(self, **options):
        id_file = Path(options["dir"]) / "wandb" / "run_id.txt"
        assert id_file.read_text().strip() == options["id"], "the id must be stored before wandb knows of it"
        self.calls.append(f"init {options['mode']}")
        if self.errors:
            raise self.errors.pop(0)
        self.runs.append(FakeRun(options))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch):
    def install(*errors):
        wandb = FakeWandb(*errors)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return install


@pytest.mark.parametrize(
    ("mode", "has_key", "expected"),
    [
        ("auto", True, "online"),
        ("auto", False, "offline"),
        ("online", False, "online"),
        ("offline", True, "offline"),
        ("disabled", True, None),
    ],
)
def test_mode(mode, has_key, expected):
    assert resolve_mode(mode, has_key) == expected


def test_names_of_a_train_record():
    assert wandb_values(TRAIN) == {
        "train/loss": 3.0,
        "perf/tok_s": 1000.0,
        "perf/data_ms": 2.0,
        "perf/a2a_ms": 9.0,
        "mem/peak_gib": 1.5,
        "moe/imbalance": 1.5,
        "moe/dead": 0.0,
        "moe/drop_frac": 0.1,
        "moe/entropy": 0.6,
        "moe/L07/load_max": 1.5,
        "moe/L07/entropy": 0.6,
    }


def test_new_balance_losses_are_logged_and_causes_of_drops_stay_in_the_file():
    causes = {"dropped_capacity_fraction": 0.1, "rerouted_fraction": 0.2, "bias_range": 0.3}
    layer = {f"moe/layer_07/{name}": value for name, value in causes.items()}
    losses = {"importance_loss": 0.5, "load_loss": 0.25, "device_loss": 1.0, "communication_loss": None}
    extra = wandb_values(TRAIN | layer | losses).items() - wandb_values(TRAIN).items()
    assert dict(extra) == {"train/importance_loss": 0.5, "train/load_loss": 0.25, "train/device_loss": 1.0}


def test_names_of_a_record_of_several_parts_of_a_block(parts_record):
    assert wandb_values(parts_record) == {
        "train/loss": 3.0,
        "train/depth_loss": 0.25,
        "moe/imbalance": 1.0,
        "moe/dead": 0.0,
        "moe/drop_frac": 0.5,
        "moe/entropy": 0.5,
        "moe/L03/load_max": 1.0,
        "moe/L03/entropy": 0.5,
        "attention/imbalance": 4.0,
        "attention/dead": 5.0,
        "attention/drop_frac": 0.0,
        "attention/entropy": 0.75,
        "attention/L03_values/load_max": 4.0,
        "attention/L03_values/entropy": 1.0,
        "attention/L03_outputs/load_max": 2.0,
        "attention/L03_outputs/entropy": 0.5,
        "depth/chosen_share": 0.125,
        "depth/causal_share": 0.125,
        "depth/causal_accuracy": 0.75,
        "depth/L01/causal_share": 0.25,
        "depth/L01/causal_accuracy": 0.75,
        "depth/L03/causal_share": 0.0,
        "depth/L03/causal_accuracy": 0.875,
    }


def test_both_losses_of_an_evaluation_are_logged():
    record = {"kind": "eval", "step": 3, "loss": 3.0, "loss_looking_ahead": 2.5, "bits_per_byte_looking_ahead": 1.5}
    expected = {"val/loss": 3.0, "val/loss_looking_ahead": 2.5, "val/bits_per_byte_looking_ahead": 1.5}
    assert wandb_values(record) == expected


def test_names_of_a_record_of_coupled_experts_and_no_nested_lists(coupled_record):
    assert wandb_values(coupled_record) == {
        "train/loss": 3.0,
        "train/orthogonality_loss": 0.125,
        "moe/similarity": 0.5,
        "moe/effective_rank": 2.5,
        "moe/message_norm": pytest.approx(0.5),
        "moe/adjacency_entropy": 1.0,
        "moe/L01/similarity": 0.25,
        "moe/L01/effective_rank": 3.0,
        "moe/L03/similarity": 0.5,
        "moe/L03/effective_rank": 2.0,
    }


def test_names_of_eval_and_event():
    record = {"kind": "eval", "step": 20, "loss": 3.1, "perplexity": 22.2, "bits_per_byte": 2.0}
    assert wandb_values(record) == {"val/loss": 3.1, "val/perplexity": 22.2, "val/bits_per_byte": 2.0}
    assert wandb_values({"kind": "event", "step": 20, "event": "saved"}) == {}


def test_a_run_from_start_to_end(fake, tmp_path):
    wandb, sink = fake(), WandbSink("offline")
    sink.start(context(tmp_path))
    sink.write(TRAIN)
    sink.write({"kind": "event", "step": 20, "event": "saved"})
    sink.close("finished")
    (run,) = wandb.runs
    assert run.options["resume"] == "allow" and run.options["name"] == "demo"
    settings = run.options["settings"]
    assert settings["init_timeout"] == 20 and settings["finish_timeout"] == 25
    assert settings["silent"] is True and settings["console"] == "off"
    assert (("*",), {"step_metric": "train/step"}) in run.metrics
    assert [values["train/step"] for values in run.logged] == [20]
    assert run.exit_code == 0
    assert SECRET not in str(run.options) and run.options["config"]["train"]["steps"] == 400


def test_a_failed_run_says_so(fake, tmp_path):
    wandb, sink = fake(), WandbSink("offline")
    sink.start(context(tmp_path))
    sink.close("failed")
    sink.close("failed")
    assert wandb.runs[0].exit_code == 1


def test_one_id_over_all_lives_and_a_new_one_for_a_new_run(fake, tmp_path):
    wandb = fake()
    for life in (context(tmp_path), context(tmp_path, start_step=40), context(tmp_path, resume="never")):
        sink = WandbSink("offline")
        sink.start(life)
        sink.close("finished")
    first, second, anew = (run.options["id"] for run in wandb.runs)
    assert first == second != anew
    assert (tmp_path / "wandb" / "run_id.txt").read_text().strip() == anew


def test_no_network_falls_back_to_offline_with_one_warning(fake, tmp_path, caplog):
    wandb = fake(RuntimeError("lookup api.example.org: no such host\nlong detail"))
    sink = WandbSink("online")
    sink.start(context(tmp_path))
    assert wandb.calls == ["setup", "init online", "teardown", "setup", "init offline"]
    assert len(caplog.records) == 1
    assert "no such host" in caplog.text and "long detail" not in caplog.text
    assert "wandb sync run/wandb/offline-1" in caplog.text


@pytest.mark.parametrize("errors", [[RuntimeError("no net"), OSError("disk full")]])
def test_when_offline_fails_too_the_group_drops_it(fake, tmp_path, caplog, errors):
    fake(*errors)
    group = SinkGroup([WandbSink("online")])
    group.start(context(tmp_path))
    assert group.names == []
    assert "disk full" in caplog.text


def test_without_the_package_the_group_drops_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    group = SinkGroup([WandbSink("offline")])
    group.start(context(tmp_path))
    assert group.names == [] and "wandb" in caplog.text


def test_a_service_that_dies_costs_one_warning(fake, tmp_path, caplog):
    wandb, group = fake(), SinkGroup([WandbSink("offline")])
    group.start(context(tmp_path))
    wandb.runs[0].log = lambda values: (_ for _ in ()).throw(BrokenPipeError("service gone"))
    for _ in range(3):
        group.write(TRAIN)
    group.close("finished")
    assert len(caplog.records) == 1 and "service gone" in caplog.text


def test_an_upload_that_is_not_done_in_time_names_the_command(fake, tmp_path, caplog):
    wandb, group = fake(), SinkGroup([WandbSink("online")])
    group.start(context(tmp_path))

    def finish(exit_code):
        raise TimeoutError("finish timed out after 25 seconds")

    wandb.runs[0].finish = finish
    group.close("finished")
    assert len(caplog.records) == 1
    assert "timed out" in caplog.text and "wandb sync run/wandb/offline-1" in caplog.text


@pytest.fixture
def real_wandb(monkeypatch):
    """The real package in a state of its own, with secrets all around it."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--token={SECRET}", f"https://u:{SECRET}@host/x"])
    yield wandb
    wandb.teardown()


def recorded(wandb, run_dir):
    wandb.teardown()  # its service writes the last block when it stops
    return b"".join(path.read_bytes() for path in run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_two_real_offline_lives_share_an_id_and_hold_no_secret(real_wandb, tmp_path, capfd):
    for start_step in (0, 10):
        sink = WandbSink("offline")
        sink.start(context(tmp_path, start_step))
        sink.write({**TRAIN, "step": start_step + 10})
        sink.close("finished")
    run_id = (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run_id}*"))) == 2
    data = recorded(real_wandb, tmp_path)
    assert b"train/loss" in data and b"moe/L07/load_max" in data
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_a_real_unreachable_server_ends_offline_in_time(real_wandb, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "INIT_TIMEOUT_S", 2)
    sink = WandbSink("online")
    began = time.monotonic()
    sink.start(context(tmp_path))
    sink.write(TRAIN)
    sink.close("finished")
    assert time.monotonic() - began < 15
    assert b"train/loss" in recorded(real_wandb, tmp_path)
    assert "recording offline" in caplog.text and "a" * 40 not in caplog.text
    assert "".join(capfd.readouterr()) == ""
