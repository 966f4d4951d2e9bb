"""A suite that is ended early leaves what it has found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_train.benchmark.results import Row, finished, growing


def row(shape: str) -> Row:
    return Row({"shape": shape}, None, {})


def test_each_case_is_known_before_the_next_is_timed() -> None:
    timed = []

    def cases() -> Iterator[list[Row]]:
        for shape in ("small", "large"):
            timed.append(shape)
            yield [row(shape), row(shape)]
        raise KeyboardInterrupt

    results = growing("layer", "about", "dense", cases())
    first = next(results)
    assert (timed, len(first.rows)) == (["small"], 2)
    second = next(results)
    assert second.rows == (row("small"), row("small"), row("large"), row("large"))
    assert len(first.rows) == 2, "what was written is not changed after"
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_a_suite_that_ends_has_found_everything() -> None:
    result = finished(growing("layer", "about", "dense", [[row("small")], [], [row("large")]]))
    assert [found.labels["shape"] for found in result.rows] == ["small", "large"]
    assert (result.name, result.about, result.baseline) == ("layer", "about", "dense")
