import json
import re
import types
from html.parser import HTMLParser

import matplotlib
import pytest

from moe_train.observe.report import RunRecord, sections, write_report
from moe_train.observe.report import page as page_module
from moe_train.observe.report.figures import OF_ALL, OF_COUPLED, OF_ROUTED
from moe_train.observe.report.reproduce import launch_command
from moe_train.observe.report.sections import MOST_CHARACTERS, figure

SECRET = "s3cr3t-value-9876"
EVIL = "<script>alert('x')</script><img src=http://evil.example/x>\"'&"
VOID = {"meta", "img", "br", "link"}


class Outline(HTMLParser):
    """Tags, headings and addresses of a page; fails when tags do not pair up."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.headings, self.addresses, self.text = [], set(), [], [], ""
        self.feed(html)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without figures, for tests of the text around them: drawing is most of a page's time."""
    monkeypatch.setattr(sections, "figures_of", lambda run: ())


def page_of(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole_page(whole_run):
    return page_of(whole_run)


def test_the_page_of_a_whole_run(whole_page):
    outline = Outline(whole_page)
    assert outline.headings == [
        "made_up",
        *(module.TITLE for module in OF_ALL + OF_ROUTED),
        "Text samples",
        "Events",
        "How to reproduce",
        "Configuration",
        "Environment",
    ]
    assert "Could not be drawn" not in whole_page
    assert "torchrun --standalone --nproc-per-node=2 -m moe_train.train run.name=made_up" in outline.text
    assert "What light <through> yonder & window breaks?" in outline.text
    assert "step_00000400" in outline.text and "commit 0123456789ab with local changes" in outline.text


def test_the_page_of_graph_coupled_experts_speaks_of_no_router(whole_graph_run):
    html = page_of(whole_graph_run)
    headings = Outline(html).headings
    assert headings[1:8] == [module.TITLE for module in OF_ALL + OF_COUPLED] and headings[8] == "Text samples"
    assert "Could not be drawn" not in html and all(module.ABSENT not in html for module in OF_COUPLED)


@pytest.mark.parametrize("graph", [{"layers": 2}, None], ids=["coupled", "routed"])
def test_before_its_first_record_a_run_is_known_by_its_configuration(graph, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"ffn": {"graph": graph}}}))
    shown = {module for module in OF_ROUTED + OF_COUPLED if module.TITLE in Outline(page_of(tmp_path)).headings}
    assert shown == set(OF_ROUTED if graph is None else OF_COUPLED)


def test_a_folder_with_records_of_both_kinds_shows_both(make_run):
    run_dir = make_run(steps=20, layers=1)
    coupled = {"kind": "train", "step": 30, "moe/layer_00/similarity": 0.5, "moe/layer_00/effective_rank": 1.5}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(coupled) + "\n")
    html = page_of(run_dir)
    assert {module.TITLE for module in OF_ROUTED + OF_COUPLED} <= set(Outline(html).headings)
    assert "Could not be drawn" not in html


def test_the_page_needs_nothing_from_outside(whole_page):
    outline = Outline(whole_page)
    assert not outline.tags & {"script", "link", "iframe", "object", "embed", "base"}
    # Within the page, or with it; matplotlib's marks and clips are references inside the same SVG.
    assert all(address.startswith(("data:image/png", "#")) for address in outline.addresses)
    assert re.search(r"url\((?!#)|@import", whole_page) is None
    assert "default-src 'none'" in whole_page


def test_light_dark_and_paper(whole_page):
    assert "prefers-color-scheme: dark" in whole_page and "@media print" in whole_page
    assert "#010203" not in whole_page  # ink follows the theme


def test_the_same_run_gives_the_same_page(whole_run, whole_page):
    assert page_of(whole_run) == whole_page


def test_everything_a_run_says_is_escaped(make_run):
    run_dir = make_run(steps=20)
    (run_dir / "config.yaml").write_text(f"run:\n  name: {json.dumps(EVIL)}\n")
    (run_dir / "environment.json").write_text(json.dumps({"host": EVIL, EVIL: EVIL, "command": [EVIL], "git": EVIL}))
    (run_dir / "samples" / "<b>.txt").write_text(EVIL)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 1, "event": EVIL, "message": EVIL, EVIL: EVIL}) + "\n")
        file.write(json.dumps({"kind": "train", "step": 30, f"moe/layer_{EVIL}/load": [1.0]}) + "\n")
    html = page_of(run_dir)
    assert not Outline(html).tags & {"script", "b"}
    assert "<script" not in html and "<img src=http" not in html


def test_secrets_are_masked(make_run, monkeypatch, no_figures):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run_dir = make_run(steps=20)
    (run_dir / "config.yaml").write_text(f"data:\n  path: s3://u:pass-{SECRET}@b\n")
    (run_dir / "environment.json").write_text(json.dumps({"command": ["python", f"--token={SECRET}"]}))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 1, "event": "failed", "message": f"key {SECRET}"}) + "\n")
    assert SECRET not in page_of(run_dir)


def test_a_run_without_anything_says_so(tmp_path):
    outline = Outline(page_of(tmp_path))
    for sentence in (
        "The run has no train or eval record yet.",
        "The run has no MoE layers, or no train record yet.",
        "None were recorded.",
        "The command was not recorded.",
        "No config.yaml.",
        "No environment.json.",
    ):
        assert sentence in outline.text


def test_a_run_before_its_first_evaluation_with_a_torn_line_says_so(make_run, no_figures):
    run_dir = make_run(steps=20)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    text = Outline(page_of(run_dir)).text
    assert "The run has no evaluation yet." in text
    assert "1 line(s) of metrics.jsonl could not be read" in text


def test_drawing_leaves_no_global_state(make_run):
    before = dict(matplotlib.rcParams)
    write_report(make_run(steps=20))
    assert dict(matplotlib.rcParams) == before


def test_one_broken_figure_does_not_cost_the_page(tmp_path, caplog):
    def draw(run):
        raise ZeroDivisionError("<odd>")

    broken = types.SimpleNamespace(TITLE="Broken", CAPTION="C.", ABSENT="A.", draw=draw)
    html = figure(broken, RunRecord.load(tmp_path))
    assert "Could not be drawn: ZeroDivisionError: &lt;odd&gt;" in html
    assert "Broken" in caplog.text


def test_a_page_that_cannot_be_finished_leaves_the_old_one(make_run, monkeypatch, no_figures):
    run_dir = make_run(steps=20)
    path = write_report(run_dir)
    before = path.read_bytes()

    def killed(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(page_module, "PARTS", (killed,))
    with pytest.raises(KeyboardInterrupt):
        write_report(run_dir)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_long_texts_are_cut_and_say_so(make_run, no_figures):
    run_dir = make_run(steps=20)
    for index in range(9):
        (run_dir / "samples" / f"step_{index}.txt").write_text("x" * 10 * MOST_CHARACTERS)
    path = write_report(run_dir)
    assert path.stat().st_size < 500_000
    assert f"[{9 * MOST_CHARACTERS} more characters]" in path.read_text()


@pytest.mark.slow
def test_the_page_of_a_large_model_stays_under_two_megabytes(make_run):
    path = write_report(make_run(steps=1000, layers=61, experts=256, drop=0.02))
    assert path.stat().st_size < 2_000_000


@pytest.mark.slow
def test_the_page_of_many_coupled_experts_stays_under_two_megabytes(make_run):
    path = write_report(make_run(steps=400, coupled=True, layers=24, experts=16, depth=3))
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, None),
        ({"command": "text"}, None),
        ({"command": ["python", "-u", "-m", "moe_train.train", "a=b c"]}, "python -m moe_train.train 'a=b c'"),
        ({"command": ["python", "train.py", "x=1"]}, "python train.py x=1"),
        (
            {"command": ["python", "-m", "m"], "variables": {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}},
            "torchrun --standalone --nproc-per-node=4 -m m",
        ),
        (
            {"command": ["python", "-m", "m"], "variables": {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}},
            "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m m",
        ),
    ],
)
def test_the_command_that_reproduces_a_run(environment, command):
    assert launch_command(environment) == command
