import json

import matplotlib
import numpy as np
import pytest

from moe_train.observe.report import RunRecord
from moe_train.observe.report.drawing import MOST_POINTS, STYLE, embed, smoothed, thinned
from moe_train.observe.report.figures import (
    OF_ALL,
    OF_COUPLED,
    OF_ROUTED,
    bias_range,
    dropped,
    expert_load,
    figures_of,
    loss,
    overflow,
)
from moe_train.observe.report.figures.expert_load import binned
from moe_train.observe.report.figures.loss import unigram_loss
from moe_train.observe.report.record import Series

FIGURES = OF_ALL + OF_ROUTED + OF_COUPLED
UNKNOWN = {"loss": None, "step_ms": None, "moe/layer_00/load": None, "moe/layer_00/similarity": None}


def name_of(module):
    return module.__name__.rpartition(".")[2]


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context(STYLE):
        yield


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


@pytest.mark.parametrize("module", FIGURES, ids=name_of)
def test_every_figure_is_titled_drawn_and_embeds(module, whole_run, whole_graph_run):
    assert module.TITLE and module.CAPTION.endswith(".") and module.ABSENT.endswith(".")
    figure = module.draw(RunRecord.load(whole_graph_run if module in OF_COUPLED else whole_run))
    assert figure is not None
    for axes in figure.axes:
        labelled = axes.get_ylabel() or axes.get_xlabel() or axes.get_label() == "<colorbar>"
        assert axes.axison is False or axes.images or labelled
    html = embed(figure, module.TITLE)
    assert (html.startswith("<svg") and "currentColor" in html) or html.startswith("<img")


@pytest.mark.parametrize("module", FIGURES, ids=name_of)
def test_no_figure_is_drawn_from_nothing(module, tmp_path):
    assert module.draw(RunRecord.load(tmp_path)) is None


@pytest.mark.parametrize("module", FIGURES, ids=name_of)
@pytest.mark.parametrize("record", [{}, UNKNOWN], ids=["empty", "null"])
def test_no_figure_is_drawn_from_unknown_values(module, record, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, **record}))
    assert module.draw(RunRecord.load(tmp_path)) is None


@pytest.mark.parametrize("module", FIGURES, ids=name_of)
@pytest.mark.parametrize("shape", [{"steps": 1, "every": 1}, {"steps": 20, "layers": 1}, {"steps": 20, "layers": 9}])
def test_figures_of_odd_shapes(module, shape, make_run):
    options = {"coupled": True} if module in OF_COUPLED else {"drop": 0.1, "bias": True}
    figure = module.draw(RunRecord.load(make_run(**options, **shape)))
    assert figure is not None
    figure.draw_without_rendering()


def test_the_loss_figure_shows_training_heldout_and_baseline(whole_run):
    run = RunRecord.load(whole_run)
    figure = loss.draw(run)
    assert figure is not None
    lines = lines_of(figure.axes[0])
    np.testing.assert_allclose(lines["held-out"][:, 0], [100, 200, 300, 400])
    np.testing.assert_allclose(lines["train"][:, 1], [record["loss"] for record in run.train])  # short: not smoothed
    assert "unigram 6.56" in lines  # 4.1 bits per byte at 1.6 nats per token and bit per byte


def test_the_loss_figure_shows_multi_token_prediction_where_there_is_any(make_run, whole_run):
    run = RunRecord.load(make_run(steps=100, ahead=True))
    lines = lines_of(loss.draw(run).axes[0])
    np.testing.assert_allclose(lines["further ahead"][:, 1], [record["mtp_loss"] for record in run.train])
    assert "further ahead" not in lines_of(loss.draw(RunRecord.load(whole_run)).axes[0])


def test_the_unigram_baseline_in_nats_per_token():
    assert unigram_loss({"loss": 3.0, "bits_per_byte": 2.0, "unigram_bits_per_byte": 4.0}) == pytest.approx(6.0)
    assert unigram_loss({"loss": 3.0, "bits_per_byte": 2.0}) is None
    assert unigram_loss({"loss": 3.0, "bits_per_byte": 0.0, "unigram_bits_per_byte": 4.0}) is None


def test_the_heat_map_is_centred_on_an_even_share(make_run):
    run = RunRecord.load(make_run(steps=100, layers=3, experts=4))
    figure = expert_load.draw(run)
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("layer")]
    assert len(panels) == 3
    image = panels[0].images[0]
    assert image.get_clim() == (-2.0, 2.0)
    expected = np.log2(run.loads("layer_00")[1].T * 4)
    np.testing.assert_allclose(image.get_array(), expected)
    assert panels[2].images[0].get_array()[0, 0] == pytest.approx(-3.0)  # a dead expert is below the scale


def test_the_heat_map_averages_over_time():
    load = np.arange(12.0).reshape(6, 2)
    np.testing.assert_allclose(binned(load, 3), [[1, 2], [5, 6], [9, 10]])
    np.testing.assert_allclose(binned(load, 6), load)
    assert binned(load, 0).shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({}, ["Range of the selection bias", "Dropped assignments", "Overflow by cause"]),
        ({"bias": True}, ["Dropped assignments", "Overflow by cause"]),
        ({"drop": 0.05}, ["Range of the selection bias"]),
    ],
    ids=["plain", "bias", "drops"],
)
def test_drops_and_bias_are_drawn_only_where_there_are_any(options, absent, make_run):
    run = RunRecord.load(make_run(steps=100, **options))
    drawn = {module.TITLE: module.draw(run) for module in figures_of(run)}
    assert [title for title, figure in drawn.items() if figure is None] == absent


def test_drops_of_records_from_before_the_causes_are_still_drawn(make_run):
    run_dir = make_run(steps=100, drop=0.05)
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    new = tuple(overflow.CAUSES)
    old = [{key: value for key, value in record.items() if not key.endswith(new)} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    run = RunRecord.load(run_dir)
    assert dropped.draw(run) is not None and overflow.draw(run) is None


def test_the_overflow_figure_shows_each_cause_that_occurred_as_a_mean_over_layers(make_run):
    run = RunRecord.load(make_run(steps=100, layers=2, drop=0.1))
    figure = overflow.draw(run)
    assert figure is not None
    lines = lines_of(figure.axes[0])
    assert list(lines) == ["dropped: expert full", "dropped: by the router", "rerouted"]
    mean = [np.mean([record[f"moe/layer_0{layer}/dropped_fraction"] for layer in range(2)]) for record in run.train]
    np.testing.assert_allclose(lines["rerouted"][:, 1], mean)
    np.testing.assert_allclose(lines["dropped: by the router"][:, 1], 0.25 * np.array(mean))


def test_the_bias_figure_has_a_line_per_layer(make_run):
    run = RunRecord.load(make_run(steps=100, layers=3, bias=True))
    figure = bias_range.draw(run)
    assert figure is not None
    lines = lines_of(figure.axes[0])
    assert list(lines) == ["layer 0", "layer 1", "layer 2"]
    np.testing.assert_allclose(lines["layer 1"][:, 1], [record["moe/layer_01/bias_range"] for record in run.train])


def test_thinning_keeps_both_ends():
    values = np.arange(10_000)
    thin = thinned(values)
    assert len(thin) == MOST_POINTS and (thin[0], thin[-1]) == (0, 9_999)
    assert (np.diff(thin) > 0).all()


def test_smoothing_follows_and_skips_what_is_unknown():
    noise = np.random.default_rng(0).normal(0, 1, 1000)
    noise[10] = np.nan
    smooth = smoothed(Series(np.arange(1000), 5 + noise))
    assert len(smooth.values) == 999
    assert np.std(smooth.values[100:]) < 0.3
    assert smooth.values[-1] == pytest.approx(5, abs=0.6)
