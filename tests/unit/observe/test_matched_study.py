"""What the studies of SwitchHead and Mixture-of-Depths take from their runs, what they compare, what they write."""

import json

import matplotlib
import pytest
import yaml
from omegaconf import OmegaConf

from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.model import ModelConfig
from moe_train.errors import DataError
from moe_train.models.counts import count
from moe_train.observe.report.drawing import STYLE
from moe_train.observe.study.matched import (
    DEPTH_STUDY,
    SWITCHHEAD_STUDY,
    DepthStudyCallback,
    picture,
    table,
    write_matched_study,
)
from moe_train.observe.study.matched.outcome import Comparison, MatchedOutcome, read_matched_outcome

STEPS, VOCABULARY, LENGTH = 80, 300, 32
MODEL = ModelConfig(dim=32, layers=2, heads=2, depth=MixtureOfDepthsConfig())


def write_run(folder, variant="depth_mod", seed=0, loss=5.0, ahead=None, final=STEPS, accuracy=True, model=MODEL):
    """Write a run whose causal choice is wrong in its first three quarters, and that is slow at its start."""
    size = count(model, VOCABULARY, LENGTH)
    records = [{"kind": "event", "step": 0, "event": "started", "parameters": size.total}]
    for number, speed in enumerate((10, 300, 100, 200), start=1):
        step = STEPS * number // 4
        record = {"kind": "train", "step": step, "loss": 6.0, "tokens": 2048 * step, "tokens_per_s": speed}
        for layer in (1, 3) if accuracy else ():
            record[f"moe/layer_0{layer}_depth/chosen_share"] = 0.125
            record[f"moe/layer_0{layer}_depth/causal_accuracy"] = 0.9 + 0.02 * layer if step > 0.75 * STEPS else 0.1
        records.append(record)
    if final:
        leaking = {} if ahead is None else {"loss_looking_ahead": ahead}
        records.append({"kind": "eval", "step": final, "loss": loss, **leaking})
    name = f"depth_study-study_{variant}-seed_{seed}"
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stated = {"train": {"steps": STEPS}, "data": {"seq_len": LENGTH}, "model": model.model_dump(mode="json")}
    (folder / name / "config.yaml").write_text(yaml.safe_dump({"run": {"name": name}, **stated}))
    return folder / name


def outcome(variant, seed=0, loss=5.0, ahead=None, speed=100.0, flops=5e6, accuracy=None):
    return MatchedOutcome(variant, seed, loss, ahead, 200_000, 800_000, flops, speed, accuracy)


def rows_of(text):
    """The cells of each line of all tables by its first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip("`"): dict(zip(rows[0], row, strict=True)) for row in rows}


def test_a_run_is_read_with_both_losses_and_how_often_its_causal_choice_is_right(tmp_path):
    run = read_matched_outcome(write_run(tmp_path, seed=2, loss=4.9, ahead=4.7))
    size = count(MODEL, VOCABULARY, LENGTH)
    assert run is not None and (run.variant, run.seed, run.tokens) == ("depth_mod", 2, 163_840)
    assert (run.loss, run.loss_looking_ahead, run.tokens_per_s) == (4.9, 4.7, 200)
    assert run.causal_accuracy == pytest.approx(0.94), "of the last quarter, over both blocks"
    assert run.training_flops == size.training_flops_per_token * 163_840


def test_a_run_whose_tokens_pass_all_blocks_has_one_loss(tmp_path):
    run = read_matched_outcome(write_run(tmp_path, accuracy=False))
    assert run is not None and run.loss_looking_ahead is None and run.causal_accuracy is None


def test_a_variant_is_compared_with_the_reference_of_its_group_seed_by_seed():
    losses = {"depth_dense": (4.0, 5.0), "depth_mod": (3.9, 5.3), "depth_moe": (3.0, 3.0), "depth_staged": (2.9, 2.8)}
    runs = [outcome(name, seed, loss) for name, values in losses.items() for seed, loss in enumerate(values)]
    comparison = Comparison(DEPTH_STUDY, (*runs, outcome("depth_mod", 2, 9.0)))
    rows = rows_of(table.markdown(comparison))
    assert rows["depth_mod"]["minus reference"] == "+0.1000 ± 0.2828 (2, 1)", "seed 2 has nothing to stand beside"
    assert rows["depth_staged"]["minus reference"].endswith("(2, 2)")
    assert rows["depth_dense"]["minus reference"] == rows["depth_moe"]["minus reference"] == "-"


def test_speed_is_absolute_and_relative_to_the_reference_of_the_same_seed():
    speeds = {"depth_dense": (1000, 2000, 1000), "depth_mod": (500, 1600, 1000), "depth_moe": (10, 10, 10)}
    runs = [outcome(name, seed, speed=speed) for name, values in speeds.items() for seed, speed in enumerate(values)]
    row = rows_of(table.markdown(Comparison(DEPTH_STUDY, tuple(runs))))["depth_mod"]
    assert (row["tokens/s"], row["relative"]) == ("1,000 (500 to 1,600)", "0.80 (0.50 to 1.00)")


def test_a_line_tells_sizes_work_and_what_is_equal():
    runs = (outcome("heads_dense", flops=5.5e6), outcome("heads_switch", loss=4.5, flops=None), outcome("unknown"))
    rows = rows_of(table.markdown(Comparison(SWITCHHEAD_STUDY, runs)))
    dense, switch = rows["heads_dense"], rows["heads_switch"]
    assert (dense["parameters"], dense["tokens"], dense["equal"]) == ("800,000", "200,000", "-")
    assert (dense["training MFLOPs per token"], dense["training TFLOPs"]) == ("5.50", "1.10")
    assert switch["training TFLOPs"] == "-" and switch["equal"] == "parameters"
    assert "looking ahead" not in dense and "right" not in dense, "nothing looks ahead in this study"
    assert rows["unknown"]["what"] == "-"


def test_both_losses_stand_side_by_side_where_choices_look_ahead():
    runs = (outcome("depth_dense"), outcome("depth_mod", loss=4.5, ahead=4.4, accuracy=0.97))
    text = table.markdown(Comparison(DEPTH_STUDY, runs))
    row = rows_of(text)["depth_mod"]
    assert (row["held-out loss"], row["looking ahead"], row["right"]) == ("4.5000", "4.4000", "97.0%")
    assert rows_of(text)["depth_dense"]["looking ahead"] == "-"
    assert "No model that writes text\nreaches it" in text


def test_missing_runs_are_named():
    everything = [outcome(variant, seed) for variant in SWITCHHEAD_STUDY.variants for seed in range(3)]
    assert "Missing" not in table.markdown(Comparison(SWITCHHEAD_STUDY, tuple(everything)))
    there = [run for run in everything if run.variant != "heads_few" and (run.variant, run.seed) != ("heads_switch", 1)]
    text = table.markdown(Comparison(SWITCHHEAD_STUDY, tuple(there)))
    assert text.endswith("Missing, or not finished: `heads_few` (seed 0, 1, 2); `heads_switch` (seed 1).\n")


def test_the_picture_has_a_row_per_variant_and_hollow_dots_for_what_looks_ahead():
    runs = [outcome(name, seed, 4.0 + seed, ahead=3.5 + seed) for name in DEPTH_STUDY.variants[:3] for seed in (0, 1)]
    with matplotlib.rc_context(STYLE):
        figure = picture.draw(Comparison(DEPTH_STUDY, (*runs, outcome("depth_staged"))))
        figure.draw_without_rendering()
    losses, speeds = figure.axes
    assert [text.get_text() for text in losses.get_yticklabels()] == [*DEPTH_STUDY.variants[:3], "depth_staged"]
    hollow = [line for line in losses.get_lines() if line.get_marker() == "o" and line.get_mfc() == "none"]
    assert [list(line.get_xdata()) for line in hollow] == [[3.5, 4.5]] * 3
    assert speeds.get_xlim()[0] == 0 and len(losses.collections) >= 1


def test_the_end_of_a_sweep_writes_the_study_and_names_what_is_missing(tmp_path, capsys):
    write_run(tmp_path, "depth_mod", ahead=4.8)
    write_run(tmp_path, "depth_dense", final=40)
    config = OmegaConf.create({"run": {"name": "depth_study", "dir": str(tmp_path / "depth_study")}})
    DepthStudyCallback().on_multirun_end(config=config, config_name="train")
    text = (tmp_path / "depth_study/table.md").read_text()
    assert "| `depth_mod` |" in text and "| `depth_dense` |" not in text and "`depth_dense` (seed 0, 1, 2)" in text
    assert (tmp_path / "depth_study/picture.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "depth_study/picture.png") in capsys.readouterr().out


def test_without_a_finished_run_there_is_no_study(tmp_path):
    with pytest.raises(DataError, match="final evaluation"):
        write_matched_study(SWITCHHEAD_STUDY, [write_run(tmp_path, final=None)], tmp_path / "out")
