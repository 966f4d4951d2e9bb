import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from omegaconf import OmegaConf

from moe_train.errors import DataError
from moe_train.observe.report.drawing import STYLE
from moe_train.observe.study import StudyCallback, picture, table, write_study
from moe_train.observe.study.outcome import FIGURES, Outcome, Spread, group, read_outcome

ROOT = Path(__file__).parents[3]
STEPS = 80


def write_run(folder, name, loss=5.0, violation=0.5, router="topk", final=STEPS, tokens=163_840, **last):
    """Write a run of two layers whose routing figures are poor in its first three quarters."""
    records = [
        {"kind": "event", "step": 0, "event": "started", "parameters": 8_000_000, "active_parameters": 3_000_000}
    ]
    for step in range(5, STEPS + 1, 5):
        late = step > 60
        record = {"kind": "train", "step": step, "loss": 6.0, "tokens": tokens * step // STEPS}
        for layer in range(2):
            record |= {
                f"moe/layer_0{layer}/load": [0.5, 0.5],
                f"moe/layer_0{layer}/max_violation": violation + layer * 0.2 if late else 3.0,
                f"moe/layer_0{layer}/dropped_fraction": 0.1 if late else 0.9,
                f"moe/layer_0{layer}/entropy": 2.0 if late else 0.1,
            }
        records.append(record | (last if step == STEPS else {}))
    if final:
        records.append({"kind": "eval", "step": final, "loss": loss})
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"run": {"name": name}, "train": {"steps": STEPS}, "model": {"ffn": {"router": {"kind": router}}}}
    (run_dir / "config.yaml").write_text(json.dumps(config))
    return run_dir


def outcome(variant, loss=5.0, sees_future=False, **figures):
    figures = {"loss": loss, "max_violation": 0.5, "dropped_fraction": 0.1, "entropy": 2.0} | figures
    figures = {name: value for name, value in figures.items() if value is not None}
    return Outcome(variant, figures, 163_840, 8_000_000, 3_000_000, sees_future)


def test_routing_figures_are_means_over_layers_and_the_last_quarter_only(tmp_path):
    run = read_outcome(write_run(tmp_path, "routing_study-study_topk-seed_0", loss=4.9, violation=0.5))
    assert run is not None and (run.variant, run.tokens, run.active_parameters) == ("topk", 163_840, 3_000_000)
    assert run.figures == pytest.approx(
        {"loss": 4.9, "max_violation": 0.6, "dropped_fraction": 0.1, "entropy": 2.0}, rel=1e-12
    )


def test_a_value_that_is_unknown_does_not_count(tmp_path):
    run = read_outcome(write_run(tmp_path, "s-topk-seed_0", **{"moe/layer_00/max_violation": None}))
    assert run is not None and run.figures["max_violation"] == pytest.approx((3 * 0.5 + 4 * 0.7) / 7)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("routing_study-study_gshard-seed_1", "gshard"),
        ("routing_study-gshard-seed_1", "gshard"),
        ("my-own-study-balance_loss_free_topk-seed_12", "balance_loss_free_topk"),
    ],
)
def test_a_sweep_and_a_hand_name_a_variant_alike(name, variant, tmp_path):
    run = read_outcome(write_run(tmp_path, name))
    assert run is not None and run.variant == variant


@pytest.mark.parametrize("odd", [{"final": None}, {"final": 40}, {"name": "routing_study"}, {"loss": None}], ids=str)
def test_what_is_not_finished_is_left_out_and_named(odd, tmp_path):
    good = write_run(tmp_path, "routing_study-topk-seed_0")
    bad = write_run(tmp_path, **{"name": "routing_study-topk-seed_1", **odd})
    study = write_study([good, bad, tmp_path / "routing_study-never-seed_0"], tmp_path / "out")
    assert study.unfinished == (bad, tmp_path / "routing_study-never-seed_0")
    assert "| `topk` | 1 |" in study.table.read_text()


def test_without_a_finished_run_there_is_no_study(tmp_path):
    with pytest.raises(DataError, match="final evaluation"):
        write_study([tmp_path / "missing"], tmp_path / "out")


def test_variants_stand_by_family_then_by_loss():
    runs = [outcome("topk", 5.0), outcome("balance_none", 4.0), outcome("capacity_random", 3.0), outcome("gshard", 4.9)]
    runs.append(outcome("topk", 4.0))
    variants = group(runs)
    assert [variant.name for variant in variants] == ["topk", "gshard", "balance_none", "capacity_random"]
    assert [len(variant.runs) for variant in variants] == [2, 1, 1, 1]


def test_the_spread_is_the_sample_standard_deviation():
    spread = Spread((1.0, 2.0, 3.0))
    assert (spread.mean, spread.deviation) == (2.0, 1.0)
    assert Spread((1.0,)).deviation is None


def test_the_table_shows_mean_deviation_and_count():
    text = table.markdown(group([outcome("topk", 4.9), outcome("topk", 5.0), outcome("topk", 5.1), outcome("hash")]))
    assert "| `topk` | 3 | 8,000,000 | 3,000,000 | 5.0000 ± 0.1000 | 0.500 ± 0.000 | 10.00% ± 0.00% | 2.000" in text
    assert "| `hash` | 1 | 8,000,000 | 3,000,000 | 5.0000 | 0.500 | 10.00% | 2.000 |" in text
    assert "Tokens per run: 163,840." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_figure_that_no_run_has_is_a_dash_and_no_zero():
    variants = group([outcome("topk", entropy=None)])
    assert table.markdown(variants).splitlines()[2].endswith("| - |")
    with matplotlib.rc_context(STYLE):
        assert not picture.draw(variants).axes[3].get_lines()


def test_runs_of_other_lengths_are_told():
    short = Outcome("hash", outcome("hash").figures, 20_480, 1, 1, False)
    assert "Tokens per run: 20,480, 163,840." in table.markdown(group([outcome("topk"), short]))


def test_a_loss_that_saw_the_future_is_marked(tmp_path):
    runs = [write_run(tmp_path, f"s-{kind}-seed_0", router=kind) for kind in ("topk", "expert_choice")]
    study = write_study(runs, tmp_path / "out")
    marked = [line for line in study.table.read_text().splitlines() if "\\*" in line]
    assert [line.split("|")[1].strip() for line in marked[:1]] == ["`expert_choice` \\*"] and len(marked) == 2
    assert study.picture.read_bytes().startswith(b"\x89PNG")


def test_without_such_a_loss_nothing_is_marked():
    assert "\\*" not in table.markdown(group([outcome("topk")]))


def test_the_picture_has_a_panel_per_figure_and_a_line_per_variant():
    variants = group([outcome("topk", 4.9), outcome("topk", 5.1), outcome("balance_none", 5.2)])
    with matplotlib.rc_context(STYLE):
        figure = picture.draw(variants)
        figure.draw_without_rendering()
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(FIGURES.values())
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["topk", "balance none"]
    dots = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[4.9, 5.1], [5.2]]
    assert dots[0].get_color() != dots[1].get_color()
    top, bottom = figure.axes[0].get_ylim()
    assert top > bottom, "the first variant is at the top"


def end_sweep(run_dir):
    config = OmegaConf.create({"run": {"name": "routing_study", "dir": str(run_dir)}})
    StudyCallback().on_multirun_end(config=config, config_name="train")


def test_the_end_of_a_sweep_writes_the_study_from_all_runs_of_its_name(tmp_path, capsys):
    write_run(tmp_path, "routing_study-study_topk-seed_0")
    write_run(tmp_path, "routing_study-gshard-seed_0")
    write_run(tmp_path, "other-hash-seed_0")
    write_run(tmp_path, "routing_study2-hash-seed_0")
    end_sweep(tmp_path / "routing_study")
    text = (tmp_path / "routing_study" / "table.md").read_text()
    assert "`topk`" in text and "`gshard`" in text and "`hash`" not in text
    assert str(tmp_path / "routing_study" / "picture.png") in capsys.readouterr().out


def test_only_one_rank_writes(tmp_path, monkeypatch):
    write_run(tmp_path, "routing_study-topk-seed_0")
    monkeypatch.setenv("RANK", "1")
    end_sweep(tmp_path / "routing_study")
    assert not (tmp_path / "routing_study").exists()


def by_hand(folders, output):
    words = [sys.executable, str(ROOT / "scripts/routing_study.py"), *map(str, folders), "--output", str(output)]
    return subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_the_script_prints_the_table_and_names_what_is_missing(tmp_path):
    folders = [write_run(tmp_path, "s-topk-seed_0"), write_run(tmp_path, "s-hash-seed_0", final=None)]
    ended = by_hand(folders, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith((tmp_path / "out" / "table.md").read_text())
    assert f"left out, not finished: {folders[1]}" in ended.stdout
    assert by_hand([tmp_path / "nothing"], tmp_path / "none").returncode == 2
