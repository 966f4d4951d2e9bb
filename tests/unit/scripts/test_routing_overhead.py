import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts/routing_overhead.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("routing_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


EVERYTHING = {"router.weight", "experts.gate_up_LDF2", "experts.down_LFD"}


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("layer", EVERYTHING),
        ("router", {"router.weight"}),
        ("plan", set()),
        ("capacity", set()),
        ("permute", set()),
        ("experts", EVERYTHING - {"router.weight"}),
        ("combine", set()),
        ("record", set()),
    ],
)
def test_each_part_is_timed_with_its_own_backward_only(part, trained, script, monkeypatch):
    layers = []
    build = script.build
    monkeypatch.setattr(script, "build", lambda *sizes: layers.append(build(*sizes)) or layers[-1])
    size = script.prepare(num_experts=4, top_k=2, num_tokens=256)
    for _ in range(2):  # a second time: no graph is left over from the first
        size.parts[part]()
    assert {name for name, parameter in layers[0].named_parameters() if parameter.grad is not None} == trained


def test_the_active_flops_do_not_depend_on_the_number_of_choices(script):
    widths = {k: script.build(16, k).experts.down_LFD.shape[1] * k for k in (1, 2, 8)}
    assert set(widths.values()) == {512}


def test_shares_are_of_the_layer_and_the_gemms_are_what_moving_rows_leaves_of_the_experts(script):
    times = {"layer": 10, "router": 1, "plan": 0.5, "permute": 0.3, "experts": 8, "combine": 0.7, "record": 0.2}
    size = script.Size(8, 2, {}, {name: [ms, ms, 100 * ms] for name, ms in (times | {"capacity": 0.4}).items()})
    cells = [cell.strip() for cell in script.line(size).split("|")[1:-1]]
    assert cells[:2] == ["2", "8"] and cells[2].startswith("10.0 (10.0 to ")
    assert cells[3:] == ["**27.0%**", "10.0%", "5.0%", "3.0%", "7.0%", "2.0%", "70.0%", "4.0%"]


def test_the_script_prints_a_line_per_size_and_leaves_out_what_is_impossible():
    words = [sys.executable, str(SCRIPT), "--experts", "4", "8", "--choices", "2", "8", "--tokens", "256"]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    said = subprocess.run([*words, "--repeats", "1"], capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr
    rows = [line.split("|") for line in said.stdout.splitlines()]
    assert len({len(row) for row in rows}) == 1, "every line has as many cells as the headings"
    assert [(row[1].strip(), row[2].strip()) for row in rows[2:]] == [("2", "4"), ("2", "8"), ("8", "8")]
