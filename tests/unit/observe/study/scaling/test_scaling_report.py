"""The page, the picture and the files of a study of scaling, and the command that writes them."""

import json
import re
import subprocess
import sys

import matplotlib
import pytest
from scaling_samples import HELD_OUT, SHAPES, grid, whole_study

from moe_train.config.compose import compose_config
from moe_train.config.report_rules import report_problems
from moe_train.config.schema import ReportConfig
from moe_train.errors import ConfigError
from moe_train.observe.report.drawing import STYLE
from moe_train.observe.study.scaling import page, picture, write_scaling_report
from moe_train.observe.study.scaling.result import as_json, read_study
from moe_train.observe.study.scaling.table import to_csv

RESAMPLES = 8


def study_of(folder, points, name="study.csv"):
    (folder / name).write_text(to_csv(points))
    return folder / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return read_study(study_of(tmp_path_factory.mktemp("whole"), whole_study()), RESAMPLES)


def drawn(study):
    with matplotlib.rc_context(STYLE):
        figure = picture.draw(study)
        figure.draw_without_rendering()
    return figure


def test_everything_is_written_beside_the_runs(tmp_path):
    path = write_scaling_report(study_of(tmp_path, whole_study()), RESAMPLES)
    assert path == tmp_path / "study" / "report" / "index.html"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "index.html", "law.json", "points.csv", "scaling.png"
    ]  # fmt: skip
    law = json.loads((path.parent / "law.json").read_text())
    assert law["points"] == len(whole_study()) - 4 and law["constants"].keys() == law["bootstrap_intervals"].keys()
    (told,) = law["heldout"]
    assert told["predicted"]["loss"] == pytest.approx(HELD_OUT.loss, rel=0.03)
    again = as_json(read_study(path.parent / "points.csv", RESAMPLES))
    assert json.loads(json.dumps(again)) == law, "the law is made again from its data"


def test_the_page_tells_law_prediction_choices_and_drops(whole):
    text = page.render(whole)
    for heading in ("Law", "Prediction", "What to do with a budget", "Capacity", "Runs"):
        assert f"<h2>{heading}</h2>" in text
    assert f"<td>{whole.fit.law.constants['alpha']:.4f}</td>" in text and f"<td>{HELD_OUT.loss:.4f}</td>" in text
    assert len(re.findall("<svg|<img", text)) == 1 and 'src="http' not in text
    assert text.count("<tr>") > len(whole.points)


def test_the_noise_is_that_of_runs_that_differ_in_the_seed(whole):
    # Three runs at 0, -0.4 and +0.4 %, and the grid's own noise on the first.
    assert whole.noise is not None and 0.001 < whole.noise.mean < 0.009
    assert len(whole.noise.values) == 1


def test_the_picture_has_a_panel_per_question(whole):
    figure = drawn(whole)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[0].rstrip(",") for title in titles] == [
        "Measured", "Same", "Experts", "Granularity", "Drops", "Loss"
    ]  # fmt: skip
    curves = figure.axes[1]
    assert len([text for text in curves.texts if "FLOPs" in text.get_text()]) == 5, (
        "each budget is named at its optimum"
    )
    assert any(line.get_marker() == "*" for line in figure.axes[0].get_lines())


@pytest.mark.parametrize("shapes", [SHAPES[:1], ((4, 2),)])
def test_a_study_of_one_kind_says_what_it_cannot_tell(tmp_path, shapes):
    study = read_study(study_of(tmp_path, [*grid(shapes=shapes), HELD_OUT]), RESAMPLES)
    text = page.render(study)
    assert "All runs have the same E" in text and "No run has a capacity limit" in text
    assert len(drawn(study).axes) == 2


def test_numbers_of_flops_are_readable():
    flops = (4e10, 1.3e11, 1.74e12, 2e14, 5e17)
    assert [picture.flops_text(value) for value in flops] == [
        "0.04 TFLOPs", "0.13 TFLOPs", "1.7 TFLOPs", "0.2 PFLOPs", "0.5 EFLOPs"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [([], ["run.dir"]), (["run.dir=a", "study.dir=b"], ["study.dir"]), (["run.dir=a"], []), (["study.dir=b"], [])],
)
def test_a_report_is_of_a_run_or_of_a_study(overrides, keys):
    if not keys:
        assert compose_config("report", ReportConfig, report_problems, overrides)
        return
    with pytest.raises(ConfigError) as caught:
        compose_config("report", ReportConfig, report_problems, overrides)
    assert [problem.key for problem in caught.value.problems] == keys


def report(*arguments, folder):
    command = [sys.executable, "-m", "moe_train.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, check=False)


def test_the_command_refuses_a_study_that_is_too_small_with_everything_that_is_missing(tmp_path):
    done = report(f"study={study_of(tmp_path, grid()[:4])}", folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0] == "data error: 3 problems"


def test_the_command_refuses_both_at_once_and_unknown_keys_together(tmp_path):
    done = report("study=a", "run.dir=b", "stdy=c", folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "study.dir=a" in done.stderr and "stdy=c" in done.stderr and "2 problems" in done.stderr


@pytest.mark.slow
def test_the_command_writes_the_page_of_a_study(tmp_path):
    done = report(f"study={study_of(tmp_path, whole_study())}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "study" / "report" / "index.html")
