"""The table of classifiers: means and deviations over seeds, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.errors import DataError
from moe_train.observe.study.sentiment import write_sentiment_study
from moe_train.observe.study.sentiment.outcome import read_judged


def write_run(folder: Path, name: str, accuracy: float, shares: tuple[float, ...], step: int = 20) -> Path:
    records = [
        {"kind": "event", "step": 0, "event": "started", "parameters": 15_696},
        {"kind": "train", "step": 20, "loss": 0.5, "tokens": 1000},
        {
            "kind": "eval", "step": step, "loss": 0.6, "accuracy": accuracy, "macro_f1": accuracy, "majority": 0.35,
            "moe/layer_00_head/utilisation": [0.9, 0.1], "moe/layer_00_head/load": list(shares),
            "moe/layer_00_head/specialisation": 0.25,
            "moe/layer_00_head/load_balance_variance": 0.02,
        },
    ]  # fmt: skip
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "config.yaml").write_text(json.dumps({"run": {"name": name}, "train": {"steps": 20}}))
    return run_dir


def test_lines_are_means_over_seeds(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "sentiment_study-study_sentiment_vader-seed_0", 0.70, (0.5, 0.5)),
        write_run(tmp_path, "sentiment_study-study_sentiment_vader-seed_1", 0.74, (0.4, 0.6)),
        write_run(tmp_path, "sentiment_study-study_sentiment_vader_alone-seed_0", 0.69, (1.0, 0.0)),
        write_run(tmp_path, "sentiment_study-study_sentiment_imdb-seed_0", 0.69, (1.0, 0.0), step=10),
    ]
    study = write_sentiment_study(runs, tmp_path / "out")
    lines = study.table.read_text().splitlines()
    assert lines[2].startswith("| `sentiment_vader` | 2 | 15,696 | 0.720 ± 0.028 |")
    assert "| 0.450 ± 0.071 |" in lines[2], "the least used expert"
    assert lines[3].startswith("| `sentiment_vader_alone` | 1 | 15,696 | 0.690 |") and "| 0.000 |" in lines[3]
    assert study.unfinished == (runs[3],) and study.picture.stat().st_size > 1000


def test_a_language_model_is_no_part_of_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "s-study_topk-seed_0", 0.7, (1.0,))
    text = (run_dir / "metrics.jsonl").read_text().replace('"accuracy": 0.7', '"perplexity": 3.0')
    (run_dir / "metrics.jsonl").write_text(text)
    assert read_judged(run_dir) is None
    with pytest.raises(DataError, match="no run of a study"):
        write_sentiment_study([run_dir], tmp_path / "out")
