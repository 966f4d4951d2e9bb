"""Results for readers: a Markdown table, the same on the console, and everything that was measured as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from moe_train.benchmark.results import VARIANT, Row, SuiteResult
from moe_train.benchmark.timing import Times
from moe_train.config.bench import BenchConfig
from moe_train.observe.environment import environment

NOTHING: Final = "-"
DIGITS: Final = 3
"""Significant digits of facts."""


def write(result: SuiteResult, config: BenchConfig, folder: Path) -> tuple[Path, Path]:
    """Write SUITE.json and SUITE.md; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record, table = folder / f"{result.name}.json", folder / f"{result.name}.md"
    record.write_text(json.dumps(as_record(result, config), indent=1) + "\n", encoding="utf-8")
    table.write_text(as_markdown(result), encoding="utf-8")
    return record, table


def as_record(result: SuiteResult, config: BenchConfig) -> dict[str, Any]:
    """Return everything that was measured, every single time included, as JSON-ready values."""
    return {
        "suite": result.name,
        "about": result.about,
        "baseline": result.baseline,
        "config": config.model_dump(mode="json"),
        "environment": environment(None),
        "rows": [row_record(result, row) for row in result.rows],
    }


def row_record(result: SuiteResult, row: Row) -> dict[str, Any]:
    """Return one row as JSON-ready values."""
    ratio = result.ratio_of(row)
    return {
        "labels": dict(row.labels),
        "setting": row.setting,
        "ms": ms_of(row.times),
        "median_ms": None if row.times is None else row.times.median_ms,
        "ratio": None if ratio is None else {"median": ratio.median, "of_rounds": list(ratio.of_rounds)},
        "other_settings": {setting: ms_of(times) for setting, times in row.others.items()},
        "facts": dict(row.facts),
        "note": row.note,
    }


def ms_of(times: Times | None) -> list[float] | None:
    """Return the single times, in milliseconds."""
    return None if times is None else list(times.ms)


def as_markdown(result: SuiteResult) -> str:
    """Return the table with its notes below."""
    header, *lines = cells_of(result)
    rule = ["---"] * len(header)
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
    notes = "".join(f"\n{number}. {note}" for note, number in numbered(result.rows).items())
    return f"{result.about}\n\n{table}\n" + (f"{notes}\n" if notes else "")


def as_console(result: SuiteResult, with_facts: bool = False) -> Table:
    """Return the table for a terminal, with a section per case; facts take more columns than most have."""
    columns = ["median, ms", f"speed / {result.baseline}", "setting", *(facts_of(result.rows) if with_facts else [])]
    table = Table(title=result.name, caption=escape(legend(result)) or None, caption_justify="left")
    table.add_column(VARIANT, overflow="fold")
    for name in [*columns, "note"]:
        table.add_column(name, justify="right", overflow="fold")
    notes, case = numbered(result.rows), None
    for row in result.rows:
        if row.case != case:
            case = row.case
            table.add_section()
            table.add_row(f"[bold]{escape(', '.join(case.values()))}[/bold]")
        table.add_row(escape(row.variant), *figures_of(result, row, columns[3:]), str(notes.get(row.note, NOTHING)))
    return table


def figures_of(result: SuiteResult, row: Row, facts: Sequence[str]) -> list[str]:
    """Return median, ratio to the baseline, setting and facts of a row."""
    return [
        NOTHING if row.times is None else f"{row.times.median_ms:.1f}",
        str(result.ratio_of(row) or NOTHING),
        row.setting or NOTHING,
        *(NOTHING if fact not in row.facts else number_text(row.facts[fact]) for fact in facts),
    ]


def legend(result: SuiteResult) -> str:
    """Return the notes by their numbers, one a line."""
    return "\n".join(f"{number}. {note}" for note, number in numbered(result.rows).items())


def cells_of(result: SuiteResult) -> list[list[str]]:
    """Return the header and one line per row: labels, times, facts, number of the note.

    Columns that no row fills are left out.
    """
    labels, facts, notes = labels_of(result.rows), facts_of(result.rows), numbered(result.rows)
    lines = [[*labels, "median, ms", f"speed relative to {result.baseline}", "setting", *facts, "note"]]
    for row in result.rows:
        known = [row.labels.get(label, NOTHING) for label in labels]
        lines.append([*known, *figures_of(result, row, facts), str(notes.get(row.note, NOTHING))])
    used = [any(line[column] != NOTHING for line in lines[1:]) for column in range(len(lines[0]))]
    return [[cell for cell, is_used in zip(line, used, strict=True) if is_used] for line in lines]


def labels_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of all labels, in order."""
    return in_order(row.labels for row in rows)


def facts_of(rows: Iterable[Row]) -> list[str]:
    """Return the names of all facts, in order."""
    return in_order(row.facts for row in rows)


def in_order(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """Return all keys in the order in which they first appear."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def numbered(rows: Iterable[Row]) -> dict[str, int]:
    """Return a number for each note; equal notes share one."""
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return {note: number for number, note in enumerate(notes, start=1)}


def number_text(value: float) -> str:
    """Return a fact with three significant digits; whole numbers, and large ones, in full."""
    if value == int(value) or abs(value) >= 10**DIGITS:
        return f"{value:,.0f}"
    return f"{value:.{DIGITS}g}"
