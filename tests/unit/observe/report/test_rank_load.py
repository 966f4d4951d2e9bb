"""The load of the ranks: from made-up loads of experts, and events that say where these were."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from moe_train.observe.report import RunRecord
from moe_train.observe.report.drawing import STYLE, embed
from moe_train.observe.report.figures import OF_SPREAD, figures_of, rank_load
from moe_train.observe.report.figures.rank_load import places_over_time, rank_shares, unmoved

SCRIPT = Path(__file__).parents[4] / "scripts" / "expert_placement.py"
LOAD = [0.4, 0.3, 0.2, 0.1]


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context(STYLE):
        yield


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("expert_placement", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(step, load=LOAD, layer="layer_01"):
    return {"kind": "train", "step": step, f"moe/{layer}/load": load}


def event(step, name, **more):
    return {"kind": "event", "step": step, "event": name, **more}


def placement(step, order, ep=2):
    return event(step, "placement", ep=ep, experts={"layer_01": order})


def written(folder, *records, ep=2) -> RunRecord:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"parallel:\n  ep: {ep}\n")
    return RunRecord.load(folder)


def shares_of(run):
    return rank_shares("layer_01", *run.loads("layer_01"), places_over_time(run))


def test_a_rank_has_what_its_experts_have_and_a_placement_holds_for_the_steps_after_it(tmp_path):
    run = written(tmp_path, event(0, "started"), train(10), placement(10, [0, 3, 2, 1]), train(11), train(20))
    np.testing.assert_allclose(shares_of(run), [[0.7, 0.3], [0.5, 0.5], [0.5, 0.5]])
    fixed = rank_shares("layer_01", *run.loads("layer_01"), unmoved(places_over_time(run)))
    np.testing.assert_allclose(fixed, [[0.7, 0.3]] * 3)


def test_what_a_life_did_beyond_its_last_checkpoint_did_not_happen(tmp_path):
    lives = [event(0, "started"), placement(10, [0, 3, 2, 1]), train(12), placement(20, [2, 3, 0, 1]), train(22),
             event(10, "resumed"), placement(10, [0, 3, 2, 1]), train(12), train(20), train(22)]  # fmt: skip
    np.testing.assert_allclose(shares_of(written(tmp_path, *lives)), [[0.5, 0.5]] * 3)
    # Resumed where places were not kept: every expert is at the place of its index again.
    np.testing.assert_allclose(shares_of(written(tmp_path, *lives[:6], *lives[7:])), [[0.7, 0.3]] * 3)


def test_records_of_another_number_of_ranks_are_left_out(tmp_path):
    run = written(tmp_path, placement(0, [0, 3, 2, 1], ep=2), train(5), placement(5, [3, 2, 1, 0], ep=4), train(9))
    shares = shares_of(run)
    assert np.isnan(shares[0]).all()
    np.testing.assert_allclose(shares[1], [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    "torn", [{}, {"ep": 0}, {"ep": 2}, {"ep": 2, "experts": {"layer_01": [0, 0, 1, 2]}},
             {"ep": 2, "experts": {"layer_01": ["a"]}}], ids=str,
)  # fmt: skip
def test_a_torn_event_counts_as_none(torn, tmp_path):
    run = written(tmp_path, event(3, "placement", **torn), train(5))
    np.testing.assert_allclose(shares_of(run), [[0.7, 0.3]])


def test_the_figure_shows_the_fullest_rank_as_it_was_and_as_it_would_have_been(tmp_path):
    records = [
        event(0, "started"),
        placement(0, [0, 1, 2, 3]),
        train(10),
        placement(10, [0, 3, 2, 1]),
        *(train(step) for step in (20, 30)),
    ]
    run = written(tmp_path, *records)
    figure = rank_load.draw(run)
    assert figure is not None
    left, right, heat = figure.axes
    lines = {axes: axes.get_lines()[0].get_ydata() for axes in (left, right)}
    np.testing.assert_allclose(lines[left], [1.4, 1.0, 1.0])
    np.testing.assert_allclose(lines[right], [1.4, 1.4, 1.4])
    assert [line.get_xdata()[0] for line in left.get_lines()[2:]] == [10]
    np.testing.assert_allclose(heat.images[0].get_array(), np.log2(2 * shares_of(run).T))
    assert embed(figure, rank_load.TITLE).startswith(("<svg", "<img"))
    assert set(OF_SPREAD) <= set(figures_of(run)) and rank_load.CAPTION.endswith(".")


@pytest.mark.parametrize("layers", [1, 4, 40])
def test_any_number_of_layers_is_drawn(layers, make_run):
    run_dir = make_run(steps=40, layers=layers)
    (run_dir / "config.yaml").write_text("parallel:\n  ep: 4\n")
    figure = rank_load.draw(RunRecord.load(run_dir))
    figure.draw_without_rendering()
    assert len([axes for axes in figure.axes if axes.images]) == min(layers, 3)


def test_a_run_on_one_rank_has_no_such_figure(make_run, tmp_path):
    run = RunRecord.load(make_run(steps=20))
    assert rank_load.draw(run) is None and not set(OF_SPREAD) & set(figures_of(run))
    assert rank_load.draw(written(tmp_path, event(0, "started"))) is None
    assert rank_load.draw(written(tmp_path, train(1), ep=3)) is None, "three ranks cannot share four experts"


def test_the_table_tells_each_rank_now_fixed_and_moved(script, tmp_path, capsys):
    written(tmp_path, train(5), placement(5, [1, 0, 3, 2]), *(train(step) for step in range(6, 30)))
    script.main([str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| layer | load of each of 2 ranks now | now | fixed | moved | experts to move |"
    assert shown[2] == "| 01 | 1.40 0.60 | 1.40 | 1.40 | 1.00 | 2 |"
    assert shown[-1].endswith("now 1.400, fixed 1.400, moved 1.000")
    script.main([str(tmp_path), "--ranks", "4"])
    assert "| 01 | 1.60 1.20 0.80 0.40 | 1.60 | 1.60 | 1.60 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--ranks", "3"], ["--ranks", "0"]], ids=str)
def test_a_number_of_ranks_that_cannot_be_is_refused(script, arguments, tmp_path):
    written(tmp_path, train(5))
    with pytest.raises(SystemExit, match="--ranks"):
        script.main([str(tmp_path), *arguments])


def test_a_folder_without_a_run_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="holds no train record"):
        script.main([str(tmp_path)])
