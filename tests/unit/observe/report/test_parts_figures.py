"""Runs whose blocks leave several records: experts in attention, tokens that pass blocks by, two held-out losses."""

import json

import matplotlib
import numpy as np
import pytest

from moe_train.observe.report import RunRecord
from moe_train.observe.report.drawing import STYLE, embed
from moe_train.observe.report.figures import (
    OF_ALL,
    OF_ATTENTION,
    OF_DEPTH,
    OF_ROUTED,
    attention_balance,
    attention_load,
    depth,
    dropped,
    entropy,
    expert_load,
    figures_of,
    loss,
    overflow,
    rank_load,
)
from moe_train.observe.report.page import render
from moe_train.observe.report.summary import tiles

NEW = OF_ATTENTION + OF_DEPTH


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context(STYLE):
        yield


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def titles(figure):
    return [title for axes in figure.axes if (title := axes.get_title(loc="left"))]


@pytest.mark.parametrize("module", NEW)
def test_the_new_figures_are_titled_drawn_and_embed(module, whole_parts_run, whole_run, tmp_path):
    assert module.TITLE and module.CAPTION.endswith(".") and module.ABSENT.endswith(".")
    figure = module.draw(RunRecord.load(whole_parts_run))
    assert figure is not None and embed(figure, module.TITLE)
    assert module.draw(RunRecord.load(whole_run)) is None, "an old run"
    assert module.draw(RunRecord.load(tmp_path)) is None, "no run"


@pytest.mark.parametrize("module", NEW)
@pytest.mark.parametrize("shape", [{"steps": 1, "every": 1}, {"steps": 20, "layers": 2}, {"steps": 20, "layers": 9}])
def test_the_new_figures_of_odd_shapes(module, shape, make_run):
    figure = module.draw(RunRecord.load(make_run(attention=True, deep=True, experts=0, **shape)))
    assert figure is not None
    figure.draw_without_rendering()


@pytest.mark.parametrize("module", NEW)
def test_unknown_figures_are_not_drawn(module, tmp_path):
    unknown = {"moe/layer_01_values/load": None, "moe/layer_01_depth/chosen_share": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, **unknown}))
    run = RunRecord.load(tmp_path)
    assert run.attention_layers and run.depth_layers and module.draw(run) is None


def test_attention_and_feed_forward_layers_have_figures_of_their_own(whole_parts_run):
    run = RunRecord.load(whole_parts_run)
    assert run.layers == run.routed_layers == [f"layer_0{layer}" for layer in range(4)]
    assert titles(expert_load.draw(run)) == [f"layer {layer}" for layer in range(4)]
    sides = [f"layer {layer}, {side}" for layer in range(4) for side in ("outputs", "values")]
    assert titles(attention_load.draw(run)) == sides
    bound = [text.get_text() for text in entropy.draw(run).axes[0].texts]
    assert bound == ["ln 8"], "the bound of the feed-forward experts, whatever attention has"


def test_drops_are_a_mean_over_feed_forward_layers_alone(make_run, whole_run, whole_parts_run):
    for module in (dropped, overflow):
        plain, parts = (lines_of(module.draw(RunRecord.load(run)).axes[0]) for run in (whole_run, whole_parts_run))
        assert plain.keys() == parts.keys()
        for label, points in plain.items():
            np.testing.assert_array_equal(points, parts[label])


def test_imbalance_and_entropy_in_attention_have_a_line_per_side(make_run):
    run = RunRecord.load(make_run(steps=100, layers=2, experts=0, attention=True))
    above, below = attention_balance.draw(run).axes
    lines = lines_of(above)
    np.testing.assert_allclose(lines["layer 0, values"][:, 1], 0.4 * 6)
    np.testing.assert_allclose(lines["layer 1, outputs"][:, 1], (1 - 0.15) / 5 * 6)
    np.testing.assert_allclose(
        lines_of(below)["layer 1, values"][:, 1], [0.4 + step / 1000 for step in range(10, 101, 10)]
    )


def test_the_depth_figure_shows_both_choices_and_how_often_they_agree(make_run):
    run = RunRecord.load(make_run(steps=100, deep=True, experts=0))
    above, below = depth.draw(run).axes
    for axes, figure in ((above, "causal_share"), (below, "causal_accuracy")):
        expected = [record[f"moe/layer_03_depth/{figure}"] for record in run.train]
        np.testing.assert_allclose(lines_of(axes)["layer 3, depth"][:, 1], expected)
    dashed = [line for line in above.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == 2 and all((line.get_ydata() == 0.125).all() for line in dashed)
    assert [line.get_ydata()[0] for line in below.get_lines() if line.get_linestyle() == "--"] == [0.875]


def test_both_held_out_losses_are_drawn_and_told(make_run, whole_run):
    run = RunRecord.load(make_run(deep=True, experts=0))
    lines = lines_of(loss.draw(run).axes[0])
    np.testing.assert_allclose(lines["held-out"][:, 1] - lines["held-out, looking ahead"][:, 1], 0.5)
    told = {tile.label: tile for tile in tiles(run)}
    last = run.evals[-1]
    assert told["Held-out loss"].value == f"{last['loss']:.3f}"
    assert told["Held-out loss"].note.endswith(f"; {last['loss_looking_ahead']:.3f} if choices see later tokens")
    assert told["Bits per byte"].note.endswith(f"{last['bits_per_byte_looking_ahead']:.3f} if choices see later tokens")
    old = RunRecord.load(whole_run)
    assert "looking ahead" not in " ".join(lines_of(loss.draw(old).axes[0]))
    assert not any("later tokens" in tile.note for tile in tiles(old))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"attention": True, "deep": True}, OF_ALL + OF_ROUTED + OF_ATTENTION + OF_DEPTH),
        ({"attention": True}, OF_ALL + OF_ROUTED + OF_ATTENTION),
        ({}, OF_ALL + OF_ROUTED),
    ],
)
def test_a_run_has_the_figures_of_its_parts(options, shown, make_run):
    assert figures_of(RunRecord.load(make_run(steps=20, **options))) == shown


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ({"attention": {"kind": "switchhead"}, "ffn": {"num_experts": 0}}, OF_ATTENTION),
        ({"attention": {"kind": "switchhead"}, "ffn": {"num_experts": 8}}, OF_ROUTED + OF_ATTENTION),
        ({"depth": {"kind": "mixture_of_depths"}, "ffn": {"num_experts": 0}}, OF_DEPTH),
        ({"attention": {"kind": "gqa"}, "depth": {"kind": "full"}, "ffn": {"num_experts": 0}}, OF_ROUTED),
    ],
)
def test_before_its_first_record_a_run_has_the_figures_of_its_configuration(model, shown, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model}))
    assert figures_of(RunRecord.load(tmp_path)) == OF_ALL + shown


def test_the_page_of_all_parts_is_whole(whole_parts_run):
    html = render(RunRecord.load(whole_parts_run))
    assert "Could not be drawn" not in html
    for module in NEW:
        assert module.TITLE in html and module.ABSENT not in html
    assert "layer 3, values" in html and "if choices see later tokens" in html


def test_the_load_of_ranks_has_the_experts_in_attention_too(make_run):
    run_dir = make_run(steps=20, layers=1, experts=0, attention=True)
    (run_dir / "config.yaml").write_text(json.dumps({"parallel": {"ep": 2}, "model": {"ffn": {"num_experts": 0}}}))
    run = RunRecord.load(run_dir)
    assert figures_of(run) == OF_ALL + OF_ATTENTION + (rank_load,)
    lines = lines_of(rank_load.draw(run).axes[0])
    np.testing.assert_allclose(lines["layer 0, values"][:, 1], 2 * (0.4 + 2 * 0.6 / 5))
