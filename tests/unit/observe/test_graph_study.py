"""What the graph study takes from its runs, which of them it compares, and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import yaml
from omegaconf import OmegaConf

from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.errors import DataError
from moe_train.models.counts import count
from moe_train.observe.report.drawing import STYLE
from moe_train.observe.study.graph import GraphStudyCallback, picture, table, write_graph_study
from moe_train.observe.study.graph.outcome import KINDS, Comparison, GraphOutcome, read_graph_outcome

ROOT = Path(__file__).parents[3]
STEPS, VOCABULARY, LENGTH = 80, 300, 32
MODEL = ModelConfig(dim=32, layers=2, heads=2, ffn=FFNConfig(num_experts=4, graph=GraphConfig()))


def write_run(folder, variant="graph_e4", seed=0, loss=5.0, final=STEPS, speeds=(10, 300, 100, 200), model=MODEL):
    """Write a run whose figures of graphs are poor in its first three quarters."""
    size = count(model, VOCABULARY, LENGTH) if isinstance(model, ModelConfig) else None
    told = {"parameters": size.total if size else 1, "active_parameters": size.active if size else 1}
    records = [{"kind": "event", "step": 0, "event": "started", **told}]
    for number, speed in enumerate(speeds, start=1):
        step = STEPS * number // len(speeds)
        record = {"kind": "train", "step": step, "loss": 6.0, "tokens": 2048 * step, "tokens_per_s": speed}
        for layer in range(2):
            late = step > 0.75 * STEPS
            record[f"moe/layer_0{layer}/similarity"] = 0.2 + 0.2 * layer if late else 0.9
            record[f"moe/layer_0{layer}/message_norm"] = [0.5, 0.7] if late else [9.0, 9.0]
        records.append(record)
    if final:
        records.append({"kind": "eval", "step": final, "loss": loss})
    name = f"graph_study-study_{variant}-seed_{seed}"
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stated = model.model_dump(mode="json") if isinstance(model, ModelConfig) else model
    config = {"run": {"name": name}, "train": {"steps": STEPS}, "data": {"seq_len": LENGTH}, "model": stated}
    (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / name


def outcome(variant, seed=0, loss=5.0, speed=100.0, similarity=0.5):
    return GraphOutcome(variant, seed, loss, 163_840, 1_500_000, 12.5e6, speed, similarity, None)


def lines_of(text):
    """The cells of each line of all tables by the first cell, the headings' too."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0].strip("`"), len(row)): row[1:] for row in rows}


def test_a_run_is_read_with_its_late_figures_and_its_usual_speed(tmp_path):
    run = read_graph_outcome(write_run(tmp_path, seed=12, loss=4.9))
    assert run is not None and (run.variant, run.seed, run.loss, run.tokens) == ("graph_e4", 12, 4.9, 163_840)
    assert run.tokens_per_s == 200, "the median without the first record"
    assert (run.similarity, run.message_norm) == (pytest.approx(0.3), pytest.approx(0.6))


@pytest.mark.parametrize("vocab_size", [None, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_vocabulary_that_the_run_had(tied, vocab_size, tmp_path):
    model = MODEL.model_copy(update={"tie_embeddings": tied, "vocab_size": vocab_size})
    run = read_graph_outcome(write_run(tmp_path, model=model))
    assert run is not None
    assert run.training_flops == count(model, VOCABULARY, LENGTH).training_flops_per_token
    assert run.parameters == count(model, VOCABULARY, LENGTH).total


@pytest.mark.parametrize("model", [None, {"dim": "wide"}, {"unknown": 1}])
def test_a_configuration_that_cannot_be_read_costs_the_flops_only(model, tmp_path):
    run = read_graph_outcome(write_run(tmp_path, model=model))
    assert run is not None and run.training_flops is None
    assert lines_of(table.markdown(Comparison((run,))))["graph_e4", 8][2] == "-"


def test_one_record_is_the_start_and_tells_no_speed(tmp_path):
    run = read_graph_outcome(write_run(tmp_path, speeds=(100,)))
    assert run is not None and run.tokens_per_s is None
    assert Comparison((run, outcome("dense_e4"))).speed("graph_e4") is None


def test_differences_are_between_runs_of_one_seed():
    graph = [outcome("graph_e2", seed, loss) for seed, loss in ((0, 4.0), (1, 5.0), (7, 9.0))]
    dense = [outcome("dense_e2", seed, loss) for seed, loss in ((1, 5.1), (0, 4.3), (3, 1.0))]
    comparison = Comparison((*graph, *dense))
    spread = comparison.difference("graph_e2", "dense_e2")
    assert spread is not None and spread.values == pytest.approx((-0.3, -0.1))
    assert comparison.difference("graph_e2", "silent_e2") is None
    assert lines_of(table.markdown(comparison))["e2", 4] == ["-", "-0.2000 ± 0.1414 (2, 2)", "-"]


def test_a_difference_counts_the_pairs_in_which_the_first_was_better():
    runs = [outcome("graph_l1", seed, 5.0) for seed in range(3)]
    runs += [outcome("sparse_l1", seed, loss) for seed, loss in enumerate((4.9, 4.9, 5.1))]
    assert lines_of(table.markdown(Comparison(tuple(runs))))["l1", 4][2].endswith(" (3, 1)")


def test_speed_is_relative_to_the_dense_model_of_the_same_size():
    speeds = {
        "graph_l3": (50, 80, 60),
        "dense_l3": (100, 100, 100),
        "graph_dot": (30, 20, 10),
        "dense_e4": (40, 40, 40),
    }
    runs = [outcome(name, seed, speed=speed) for name, values in speeds.items() for seed, speed in enumerate(values)]
    lines = lines_of(table.markdown(Comparison(tuple(runs))))
    assert lines["graph_l3", 8][4] == "0.60 (0.50 to 0.80)"
    assert lines["graph_dot", 8][4] == "0.50 (0.25 to 0.75)"


def test_the_first_table_has_a_line_per_variant_in_order():
    names = ["graph_cosine", "sparse_e2", "graph_l0", "graph_e2", "graph_shut"]
    comparison = Comparison(tuple(outcome(name, loss=5.0 - 0.1 * ("shut" in name)) for name in names))
    lines = [key for key, width in lines_of(table.markdown(comparison)) if width == 8][1:]
    assert lines == ["graph_e2", "sparse_e2", "graph_l0", "graph_shut", "graph_cosine"]
    first = lines_of(table.markdown(comparison))["graph_e2", 8]
    assert first == ["1", "1,500,000", "12.50", "5.0000", "-", "0.500", "-"]


def test_other_variants_are_seen_from_the_base():
    losses = {"graph_e4": 5.0, "dense_e4": 4.0, "graph_dot": 4.5, "graph_block": 4.2, "silent_block": 4.3}
    text = table.markdown(Comparison(tuple(outcome(name, loss=loss) for name, loss in losses.items())))
    lines = lines_of(text)
    assert lines["graph_dot", 3] == ["-0.5000 (1, 1)", "+0.5000 (1, 0)"]
    assert lines["graph_block` - `silent_block", 3] == ["-0.1000 (1, 1)", "-"]
    assert "Tokens per run: 163,840." in text


def test_the_picture_has_a_line_per_kind_and_a_row_per_other_variant():
    names = [f"{kind}_{size}" for kind in KINDS for size in ("e2", "e4", "l1")] + ["graph_dot"]
    runs = [outcome(name, seed, 4.0 + 0.1 * place + 0.01 * seed) for place, name in enumerate(names) for seed in (0, 1)]
    with matplotlib.rc_context(STYLE):
        figure = picture.draw(Comparison(tuple(runs)))
        figure.draw_without_rendering()
        plain = picture.draw(Comparison(tuple(run for run in runs if run.variant != "graph_dot")))
    by_experts, by_layers, rows = figure.axes
    assert [bars.get_label() for bars in by_experts.containers] == list(KINDS)
    assert [text.get_text() for text in by_layers.get_xticklabels()] == ["0", "1", "2", "3"]
    graph = by_layers.containers[0].lines[0]
    assert graph.get_ydata() == pytest.approx([4.205, 4.105]), "1 graph layer, and the 2 of e4"
    assert [round(place) for place in graph.get_xdata()] == [1, 2]
    assert [text.get_text() for text in rows.get_yticklabels()] == ["graph_dot", *(f"{kind}_e4" for kind in KINDS)]
    assert len(plain.axes) == 2


def test_the_end_of_a_graph_sweep_writes_the_study(tmp_path, capsys):
    write_run(tmp_path, "graph_e2")
    write_run(tmp_path, "dense_e2", final=40)
    config = OmegaConf.create({"run": {"name": "graph_study", "dir": str(tmp_path / "graph_study")}})
    GraphStudyCallback().on_multirun_end(config=config, config_name="train")
    text = (tmp_path / "graph_study/table.md").read_text()
    assert "`graph_e2`" in text and "`dense_e2`" not in text
    assert (tmp_path / "graph_study/picture.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "graph_study/picture.png") in capsys.readouterr().out


def test_without_a_finished_run_there_is_no_graph_study(tmp_path):
    with pytest.raises(DataError, match="final evaluation"):
        write_graph_study([write_run(tmp_path, final=None)], tmp_path / "out")


def by_hand(folders, output):
    words = [sys.executable, str(ROOT / "scripts/graph_study.py"), *map(str, folders), "--output", str(output)]
    return subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)


@pytest.mark.slow
def test_the_script_prints_the_tables_and_names_what_is_missing(tmp_path):
    folders = [write_run(tmp_path, "graph_e2"), write_run(tmp_path, "dense_e2", final=None)]
    ended = by_hand(folders, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith((tmp_path / "out/table.md").read_text())
    assert f"left out, not finished: {folders[1]}" in ended.stdout
    nothing = by_hand([tmp_path / "nothing"], tmp_path / "none")
    assert nothing.returncode == 2 and "Traceback" not in nothing.stderr
