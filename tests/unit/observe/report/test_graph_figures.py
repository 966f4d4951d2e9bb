import itertools
import json
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moe_train.observe.report import RunRecord
from moe_train.observe.report.drawing import STYLE, ends_and_middle
from moe_train.observe.report.figures import (
    OF_COUPLED,
    OF_ROUTED,
    adjacency_entropy,
    expert_similarity,
    graph_weights,
    message_norm,
)

PREFIX = "moe/layer_00"
EDGES = [[0.0, 0.25], [0.5, 0.0]]
SIGNED = [[0.0, -0.125], [0.25, 0.0]]


@pytest.fixture(autouse=True)
def house_style():
    with matplotlib.rc_context(STYLE):
        yield


def written(folder, *figures, layer="layer_00"):
    """A run whose records hold these figures of one layer, at steps 1, 2, 3 ..."""
    records = [
        {"kind": "train", "step": step, **{f"moe/{layer}/{name}": value for name, value in found.items()}}
        for step, found in enumerate(figures, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return RunRecord.load(folder)


def heat_maps(figure):
    return [axes for axes in figure.axes if axes.images]


def values_of(axes):
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def titles(figure):
    """The texts above the heat maps."""
    return [text.get_text() for text in figure.texts if text.get_text()]


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_edges_at_both_ends_share_a_scale_and_messages_have_their_own(tmp_path):
    later = [[0.0, 0.75], [1.0, 0.0]]
    sent = [[0.0, 0.5], [0.125, 0.0]]
    first = {"similarity": 0.1, "adjacency": [EDGES], "message_strength": [EDGES]}
    last = {"similarity": 0.2, "adjacency": [later], "message_strength": [sent]}
    figure = graph_weights.draw(written(tmp_path, first, first, last))
    start, end, messages = heat_maps(figure)
    assert [axes.get_title(loc="left") for axes in (start, end, messages)] == ["step 1", "step 3", "messages"]
    nan = math.nan
    np.testing.assert_array_equal(values_of(start), [[nan, 0.25], [0.5, nan]])
    np.testing.assert_array_equal(values_of(end), [[nan, 0.75], [1.0, nan]])
    np.testing.assert_array_equal(values_of(messages), [[nan, 0.5], [0.125, nan]])
    assert start.images[0].get_clim() == end.images[0].get_clim() == (0.0, 1.0)
    assert messages.images[0].get_clim() == (0.0, 0.5)
    assert (start.get_xlabel(), start.get_ylabel()) == ("sends", "receives")
    # Row 1 is below row 0, column 1 right of column 0, and the numbers stand in their cells.
    assert {text.get_text(): text.get_position() for text in end.texts} == {"0.75": (1, 0), "1.00": (0, 1)}
    assert end.yaxis_inverted() and not end.xaxis_inverted()


def test_messages_of_both_signs_have_colours_on_both_sides_of_zero(tmp_path):
    run = written(tmp_path, {"similarity": 0.1, "adjacency": [EDGES], "message_strength": [SIGNED]})
    start, _, messages = heat_maps(graph_weights.draw(run))
    assert messages.images[0].get_clim() == (-0.25, 0.25)
    assert start.images[0].get_clim() == (0.0, 0.5)


def test_a_message_of_no_strength_is_an_edge_all_the_same(tmp_path):
    silent = np.zeros((1, 2, 2)).tolist()
    run = written(tmp_path, {"similarity": 0.1, "adjacency": [EDGES], "message_strength": silent})
    messages = heat_maps(graph_weights.draw(run))[2]
    np.testing.assert_array_equal(values_of(messages), [[math.nan, 0.0], [0.0, math.nan]])


@pytest.mark.parametrize("sent", [None, [], [[[0.0]]], [[["x", None], [None, None]]]], ids=str)
def test_messages_that_are_not_known_are_left_out(sent, tmp_path):
    run = written(tmp_path, {"similarity": 0.1, "adjacency": [EDGES], "message_strength": sent})
    figure = graph_weights.draw(run)
    assert len(heat_maps(figure)) == 2
    figure.draw_without_rendering()


def test_unknown_and_infinite_weights_do_not_stretch_the_scale(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run = written(tmp_path, {"similarity": 0.1, "adjacency": [[[0.0, 0.25], [None, 0.5]]]})
    path.write_text(path.read_text().replace("null", "Infinity"))
    start = heat_maps(graph_weights.draw(RunRecord.load(run.run_dir)))[0]
    np.testing.assert_array_equal(values_of(start), [[math.nan, 0.25], [math.nan, 0.5]])
    assert start.images[0].get_clim() == (0.0, 0.5)


@pytest.mark.parametrize(
    ("shape", "shown", "note"),
    [
        ({"layers": 1, "depth": 1}, ["layer 0"], []),
        ({"layers": 2, "depth": 2}, [f"layer {n}, graph layer {m} of 2" for n in range(2) for m in (1, 2)], []),
        ({"layers": 12, "depth": 1}, [f"layer {n}" for n in range(12)], []),
        ({"layers": 24, "depth": 1}, ["layer 0", "layer 12", "layer 23"], ["first, middle and last of 24 layers"]),
        (
            {"layers": 9, "depth": 5},
            [f"layer {n}, graph layer {m} of 5" for n in (0, 4, 8) for m in (1, 3, 5)],
            ["first, middle and last of 9 layers; first, middle and last of 5 graph layers"],
        ),
    ],
    ids=str,
)
def test_the_page_shows_all_graph_layers_or_says_which(shape, shown, note, make_run):
    figure = graph_weights.draw(RunRecord.load(make_run(steps=20, coupled=True, **shape)))
    assert titles(figure) == note + shown
    assert len(heat_maps(figure)) == 3 * len(shown)
    empty = [text for text in figure.texts if not text.get_text()]
    renderer = FigureCanvasAgg(figure).get_renderer()
    outlines = [artist.get_tightbbox(renderer) for artist in (*figure.axes, *figure.texts) if artist not in empty]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(outlines, 2))
    assert all(figure.bbox.contains(*corner) for outline in outlines for corner in (outline.min, outline.max))
    assert figure.get_size_inches()[1] < 13  # a page, not a scroll


@pytest.mark.parametrize("experts", [2, 5, 16])
def test_numbers_are_written_where_they_have_room(experts, make_run):
    figure = graph_weights.draw(RunRecord.load(make_run(steps=20, coupled=True, experts=experts)))
    written_numbers = {len(axes.texts) for axes in heat_maps(figure)}
    assert written_numbers == ({0} if experts == 16 else {experts * (experts - 1)})


def test_cells_are_legible_on_any_colour(tmp_path):
    weights = [[0.01, 1.0], [0.0, 0.02]]
    run = written(tmp_path, {"similarity": 0.1, "adjacency": [weights], "message_strength": [weights]})
    for axes in heat_maps(graph_weights.draw(run)):
        inks = {text.get_text(): text.get_color() for text in axes.texts}
        assert inks == {"0.01": "white", "1.00": "black", "0.02": "white"}  # both scales go from dark to light


def test_similarity_and_rank_have_a_line_per_layer(make_run):
    run = RunRecord.load(make_run(steps=100, coupled=True, layers=3, experts=5))
    above, below = expert_similarity.draw(run).axes
    for axes, name in ((above, "similarity"), (below, "effective_rank")):
        expected = [record[f"moe/layer_01/{name}"] for record in run.train]
        np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), expected)
    assert list(lines_of(above)) == ["layer 0", "layer 1", "layer 2"]
    assert [text.get_text() for text in below.texts] == ["5 experts"]
    assert list(below.get_lines()[3].get_ydata()) == [5, 5]


@pytest.mark.parametrize("present", ["similarity", "effective_rank"])
def test_one_of_similarity_and_rank_alone(present, tmp_path):
    figures = {"similarity": None, "effective_rank": None, present: 1.5}
    figure = expert_similarity.draw(written(tmp_path, figures, {**figures, "cosines": "torn"}))
    assert [len(axes.get_lines()) for axes in figure.axes] == ([1, 0] if present == "similarity" else [0, 1])
    figure.draw_without_rendering()


def test_message_norms_have_a_panel_per_graph_layer(make_run):
    run = RunRecord.load(make_run(steps=100, coupled=True, layers=3, depth=2))
    figure = message_norm.draw(run)
    for at, axes in enumerate(figure.axes):
        lines = axes.get_lines()
        expected = [record["moe/layer_02/message_norm"][at] for record in run.train]
        np.testing.assert_allclose(lines[2].get_ydata(), expected)
        assert axes.get_ylabel() == f"received / held\ngraph layer {at + 1} of 2"
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(line.get_ydata().max() for line in lines)
    assert len(figure.axes) == 2


def test_many_graph_layers_show_the_first_the_middle_and_the_last(make_run):
    figure = message_norm.draw(RunRecord.load(make_run(steps=20, coupled=True, depth=6)))
    assert [axes.get_ylabel().split("\n")[1] for axes in figure.axes] == [f"graph layer {n} of 6" for n in (1, 4, 6)]


def test_unknown_norms_leave_gaps_and_a_lost_graph_layer_leaves_its_panel_out(tmp_path):
    rows = [[0.5, None], [None, None], [0.25, None], [], None]
    run = written(tmp_path, *({"similarity": 0.1, "message_norm": row} for row in rows[:3]))
    (axes,) = message_norm.draw(run).axes
    np.testing.assert_array_equal(lines_of(axes)["layer 0"], [[1, 0.5], [3, 0.25]])
    for row in rows[3:]:
        assert message_norm.draw(written(tmp_path, {"similarity": 0.1, "message_norm": row})) is None


def test_the_entropy_of_the_edges_stays_under_the_logarithm_of_the_sources(make_run):
    run = RunRecord.load(make_run(steps=100, coupled=True, experts=6))
    (axes,) = adjacency_entropy.draw(run).axes
    assert [text.get_text() for text in axes.texts] == ["ln 5"]  # no expert listens to itself
    assert axes.get_lines()[4].get_ydata()[0] == pytest.approx(math.log(5))
    np.testing.assert_allclose(
        axes.get_lines()[0].get_ydata(), [record[f"{PREFIX}/adjacency_entropy"] for record in run.train]
    )


def test_an_entropy_without_known_edges_has_no_bound(tmp_path):
    run = written(tmp_path, {"similarity": 0.1, "adjacency_entropy": 0.5, "adjacency": [[0.0]] * 3})
    assert list(adjacency_entropy.draw(run).axes[0].texts) == []


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        ({}, set(OF_COUPLED)),
        ({"experts": 1}, set()),
        ({"experts": 2, "depth": 1}, set(OF_COUPLED)),
        ({"depth": 0}, {expert_similarity}),
        ({"layers": 1, "depth": 1, "experts": 16}, set(OF_COUPLED)),
        ({"signed": True}, set(OF_COUPLED)),
    ],
    ids=["ordinary", "one expert", "two experts", "no messages", "sixteen experts", "messages of both signs"],
)
def test_what_is_drawn_of_coupled_experts(shape, drawn, make_run):
    run = RunRecord.load(make_run(**{"steps": 20, "coupled": True, "layers": 2, **shape}))
    figures = {module: module.draw(run) for module in OF_COUPLED}
    assert {module for module, figure in figures.items() if figure is not None} == drawn
    for module in drawn:
        figures[module].draw_without_rendering()
    assert [module.draw(run) for module in OF_ROUTED] == [None] * len(OF_ROUTED)


def test_nothing_of_a_graph_is_drawn_of_routed_experts(whole_run):
    run = RunRecord.load(whole_run)
    assert [module.draw(run) for module in OF_COUPLED] == [None] * len(OF_COUPLED)


@pytest.mark.parametrize("module", OF_COUPLED, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("torn", [None, "x", 3.0, True, [], [[]], [None, "x"], [[1.0], [2.0, 3.0]], {"a": 1}], ids=str)
def test_torn_figures_do_not_break_a_figure(module, torn, tmp_path, make_run):
    names = ("similarity", "cosines", "effective_rank", "message_strength", "message_norm", "adjacency")
    damaged = {f"moe/layer_01/{name}": torn for name in (*names, "adjacency_entropy")}
    run_dir = make_run(steps=20, coupled=True, layers=2)
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for position in (1, len(lines) - 1):  # the layer's first record and its last
        lines[position] |= damaged
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    module.draw(RunRecord.load(run_dir)).draw_without_rendering()


def test_ends_and_middle():
    assert ends_and_middle([], 3) == []
    assert ends_and_middle(range(3), 3) == [0, 1, 2]
    assert ends_and_middle("abcdefg", 3) == ["a", "d", "g"]
