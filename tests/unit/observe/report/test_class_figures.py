"""The report of a run that tells classes: figures, sentences, and odd or missing records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from moe_train.observe.report import RunRecord
from moe_train.observe.report.drawing import STYLE, embed
from moe_train.observe.report.figures import OF_CLASS_EXPERTS, OF_CLASSES, figures_of
from moe_train.observe.report.page import render
from moe_train.observe.report.summary import tiles
from moe_train.observe.sinks.lines import eval_line

FIGURES = OF_CLASSES + OF_CLASS_EXPERTS
LAYERS = ("layer_00", "layer_02_head")


def judged(step: int, by_class: list[list[int]], classes: int = 3) -> dict[str, Any]:
    """An eval record; the last expert takes nothing where its column is zero."""
    totals = [sum(column) for column in zip(*by_class, strict=True)]
    shares = [total / sum(totals) for total in totals]
    record: dict[str, Any] = {
        "kind": "eval", "step": step, "loss": 0.7, "accuracy": 0.8, "majority": 0.36, "macro_f1": 0.79,
        "confusion": [[5 if a == b else 1 for b in range(classes)] for a in range(classes)],
        "classes": [f"class <{c}>" for c in range(classes)], "eval_texts": 5 * classes,
    }  # fmt: skip
    for layer in LAYERS:
        record |= {f"moe/{layer}/by_class": by_class, f"moe/{layer}/utilisation": shares, f"moe/{layer}/load": shares}
        record |= {f"moe/{layer}/specialisation": 1.0, f"moe/{layer}/load_balance_variance": 1 / 48}
    return record


def written(folder: Path, evals: list[dict[str, Any]]) -> RunRecord:
    train = {"kind": "train", "step": 1, "loss": 1.1} | {f"moe/{layer}/load": [0.25] * 4 for layer in LAYERS}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [train, *evals]))
    (folder / "config.yaml").write_text("run: {name: made_up}\ntask: {kind: sentiment}\ntrain: {steps: 20}\n")
    return RunRecord.load(folder)


PUBLISHED = [[0, 166, 0, 0], [166, 0, 0, 0], [0, 0, 166, 0]]


@pytest.fixture(autouse=True)
def house_style() -> Any:
    with matplotlib.rc_context(STYLE):
        yield


@pytest.mark.parametrize("module", FIGURES, ids=lambda module: module.TITLE)
def test_figures_are_drawn_or_say_that_nothing_is_there(module: Any, tmp_path: Path) -> None:
    run = written(tmp_path, [judged(10, PUBLISHED), judged(20, PUBLISHED)])
    assert module.CAPTION.endswith(".") and module.ABSENT.endswith(".")
    figure = module.draw(run)
    assert figure is not None and embed(figure, module.TITLE)
    assert module.draw(written(tmp_path, [])) is None
    torn = {"kind": "eval", "step": 5, "accuracy": None, "confusion": [[1], [2, 3]], "moe/layer_00/by_class": [[None]]}
    assert module.draw(written(tmp_path, [torn])) is None


def test_the_page_shows_them_and_says_collapse_in_words(tmp_path: Path) -> None:
    run = written(tmp_path, [judged(20, PUBLISHED)])
    assert set(FIGURES) <= set(figures_of(run))
    page = render(run)
    assert all(module.TITLE in page for module in FIGURES) and "Could not be drawn" not in page
    assert "head: expert 3 is unused" in page and "the router has collapsed" in page
    assert "class &lt;0&gt;" in page and "class <0>" not in page
    even = render(written(tmp_path, [judged(20, [[40, 50, 60, 50]] * 3)]))
    assert "the router has collapsed" not in even and "every expert is used" in even


def test_a_column_of_the_picture_is_an_expert(tmp_path: Path) -> None:
    """Counts stand where class and expert cross, and the index of the record in the title."""
    by_class = OF_CLASS_EXPERTS[0]
    figure = by_class.draw(written(tmp_path, [judged(20, PUBLISHED)]))
    assert figure is not None
    panel = figure.axes[0]
    told = {tuple(int(at) for at in text.get_position()): text.get_text() for text in panel.texts}
    assert told[1, 0] == told[0, 1] == told[2, 2] == "166" and told[3, 0] == "0"
    assert panel.get_title(loc="left") == "layer 0: SI 1.000, LBV 0.02083"
    shares = panel.images[0].get_array()
    assert shares[0, 1] == 1.0 and bool(shares.mask[0, 3] if shares.mask.any() else shares[0, 3] != shares[0, 3])


def test_card_and_console_tell_the_accuracy(tmp_path: Path) -> None:
    record = judged(20, PUBLISHED)
    found = {tile.label: tile for tile in tiles(written(tmp_path, [record]))}
    assert found["Accuracy"].value == "80.0%" and "majority 36.0%" in found["Accuracy"].note
    assert "nats per text" in found["Held-out loss"].note
    assert eval_line(record) == "eval step 20 | loss 0.700 | accuracy 80.0% (majority 36.0%) | macro-F1 0.790"


def test_many_classes_are_drawn_without_numbers(tmp_path: Path) -> None:
    run = written(tmp_path, [judged(20, [[1, 2, 3, 4]] * 120, classes=120)])
    for module in FIGURES:
        figure = module.draw(run)
        assert figure is not None and not (module is OF_CLASSES[1] and figure.axes[0].texts)
