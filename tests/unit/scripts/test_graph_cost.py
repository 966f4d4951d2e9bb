import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_train.config.graph import GraphConfig
from moe_train.models.counts import count

SCRIPT = Path(__file__).parents[3] / "scripts/graph_cost.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # as when it is run: there lies peak_memory
    spec = importlib.util.spec_from_file_location("graph_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules[spec.name], sys.modules["peak_memory"]


@pytest.fixture
def setting(script):
    return script.Setting(layers=2, num_tokens=256, precision="fp32", device=torch.device("cpu"), repeats=3)


@pytest.mark.parametrize("num_experts", [2, 16])
def test_the_dense_model_has_equal_flops(num_experts, script):
    config = script.coupled(num_experts, layers=2)
    flops = [script.training_flops(one) for one in (config, script.dense_like(config))]
    assert flops[1] == pytest.approx(flops[0], rel=0.005)


@pytest.mark.parametrize("max_neighbors", [0, 1, 3])
def test_the_products_of_a_layer_are_what_a_block_multiplies_beside_its_attention(max_neighbors, script):
    per_block = [
        count(script.coupled(4, layers, GraphConfig(max_neighbors=max_neighbors)), 100, 1).forward_flops_per_token / 2
        for layers in (1, 2)
    ]
    projections, scores = 4 * script.DIM**2, 2 * script.DIM  # a sequence of one token sees itself
    assert script.layer_products(4, max_neighbors) == per_block[1] - per_block[0] - projections - scores


@pytest.mark.parametrize("num_sources", [1, 3])
def test_both_ways_of_summing_have_the_same_edges(num_sources, script, setting, monkeypatch):
    seen = {}

    def spy(name, real):
        return lambda *inputs: seen.setdefault(name, (real(*inputs), inputs))[0]

    for name in ("sum_chosen_messages", "sum_messages"):
        monkeypatch.setattr(script, name, spy(name, getattr(script, name)))
    for timed in script.sum_steps(4, num_sources, setting):
        timed.work()
    gathered, product = seen["sum_chosen_messages"], seen["sum_messages"]
    torch.testing.assert_close(gathered[0], product[0])
    strength_TEE, h_TED = product[1]
    assert strength_TEE.grad is not None and h_TED.grad is not None, "the backward pass is timed, too"
    assert bool(((strength_TEE != 0).sum(dim=2) == num_sources).all())


def test_ratios_are_taken_within_rounds(script):
    slow, fast = script.Timed(lambda: None, [2.0, 30.0, 4.0]), script.Timed(lambda: None, [1.0, 10.0, 4.0])
    assert slow.over(fast) == 2.0


def test_everything_takes_turns_after_the_warm_up(script, setting):
    order = []
    timed = [script.Timed(lambda name=name: order.append(name)) for name in "ab"]
    script.measure(timed, setting)
    assert "".join(order) == "ab" * (script.WARM_UP + setting.repeats)
    assert [len(one.times_ms) for one in timed] == [setting.repeats] * 2


def test_the_peak_is_the_most_that_was_held_at_once(script):
    kilobyte = torch.empty(256)

    def work():
        a = kilobyte + 1
        b = a * 2  # two at once
        del a
        c = b.view(16, 16)  # the same memory
        c += 1
        del b
        d = c.exp()  # two again
        del c, d
        (kilobyte + 1).sum()

    assert script.peak_bytes(work, torch.device("cpu")) == 2048


def test_the_peak_sees_what_is_kept_for_the_backward_pass(script):
    x, weight = torch.zeros(256, requires_grad=True), torch.ones(256, requires_grad=True)
    x.grad, weight.grad = torch.zeros(256), torch.zeros(256)

    def depth(number):
        def work():
            y = x
            for _ in range(number):
                y = torch.sin(y * weight)
            torch.autograd.backward(y, torch.ones(256))

        return script.peak_bytes(work, torch.device("cpu"))

    assert depth(9) - depth(5) == 4 * 2 * 1024, "each product and each sine is kept"


def test_recomputed_chunks_hold_less(script, setting):
    kept, chunked = (
        script.layer_step(8, graph, setting, layers=3)
        for graph in (GraphConfig(), GraphConfig(recompute=True, chunk_tokens=64))
    )
    for timed in (kept, chunked):
        timed.work()
    peaks = [script.peak_bytes(timed.work, setting.device) for timed in (kept, chunked)]
    assert peaks[1] < 0.4 * peaks[0]


@pytest.mark.slow
def test_the_script_prints_its_tables():
    words = [sys.executable, str(SCRIPT), "--experts", "2", "3", "--wide", "4", "--neighbors", "1", "2", "9"]
    words += ["--tokens", "256", "--layers", "1", "--repeats", "1", "--precision", "bf16"]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("bf16, 256 tokens")
    tables = [part for part in said.stdout.split("\n\n") if part.startswith("| ")]
    rows = [[line.split("|")[1:-1] for line in part.strip().splitlines()] for part in tables]
    assert all(len({len(row) for row in part}) == 1 for part in rows), "every line has as many cells as the headings"
    assert [row[0].strip() for row in rows[0][2:]] == ["2", "3"]
    assert [(row[0].strip(), row[1].strip()) for row in rows[1][2:]] == [("4", "3"), ("4", "2"), ("4", "1"), ("4", "0")]
    assert len(rows[2]) == 2 + 3
