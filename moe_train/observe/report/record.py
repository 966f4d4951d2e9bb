"""Everything a run folder says about its run, read once, with what is missing or torn left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moe_train.observe.records import LOAD_KEY, Record, finite, parse_record
from moe_train.observe.sinks.jsonl import FILE_NAME


@dataclass(frozen=True)
class Series:
    """One quantity over the run.

    Attributes:
        steps: optimizer steps, ascending, int64 of shape (N,).
        values: float64 of shape (N,); NaN where the record had none.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(np.isfinite(self.values).any())


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote.

    Attributes:
        name: name of its file.
        text: what it wrote.
    """

    name: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; a part that is missing is empty.

    Attributes:
        run_dir: the folder.
        config: the configuration as nested mappings.
        config_text: the same as the file has it.
        environment: the content of ``environment.json``.
        train: train records, one per step, ascending.
        evals: eval records, one per step, ascending.
        events: event records in the order they were written.
        samples: texts that the model wrote, by file name.
        unreadable_lines: lines of ``metrics.jsonl`` that are torn or no records.
    """

    run_dir: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[Sample]
    unreadable_lines: int

    @classmethod
    def load(cls, run_dir: Path) -> RunRecord:
        """Read the run in ``run_dir``; files that are missing or damaged count as empty."""
        lines = [line for line in _text(run_dir / FILE_NAME).split("\n") if line.strip()]
        records = [record for line in lines if (record := parse_record(line)) is not None]
        config_text = _text(run_dir / "config.yaml")
        return cls(
            run_dir=run_dir,
            config=_mapping(yaml.safe_load, config_text),
            config_text=config_text,
            environment=_mapping(json.loads, _text(run_dir / "environment.json")),
            train=_by_step(records, "train"),
            evals=_by_step(records, "eval"),
            events=[record for record in records if record["kind"] == "event"],
            samples=[Sample(path.name, _text(path)) for path in sorted((run_dir / "samples").glob("*.txt"))],
            unreadable_lines=len(lines) - len(records),
        )

    @property
    def name(self) -> str:
        """Name of the run: the configured one, else that of its folder."""
        return str(self.setting("run.name") or self.run_dir.resolve().name)

    @property
    def layers(self) -> list[str]:
        """Names of the MoE layers that any train record speaks of: ``["layer_01", "layer_03"]``."""
        keys = {key for record in self.train for key in record}
        return sorted(match[1] for key in keys if (match := LOAD_KEY.fullmatch(key)))

    def setting(self, path: str) -> Any:
        """Return the configured value at a dotted ``path``, or None."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def train_series(self, key: str) -> Series:
        """Return ``key`` of the train records, in the unit of the record."""
        return series(self.train, lambda record: record.get(key))

    def eval_series(self, key: str) -> Series:
        """Return ``key`` of the eval records, in the unit of the record."""
        return series(self.evals, lambda record: record.get(key))

    def loads(self, layer: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the expert loads of one MoE layer over the run.

        Returns:
            Steps of shape (N,), and loads of shape (N, E): each expert's fraction of the assignments, NaN if unknown.
        """
        key = f"moe/{layer}/load"
        rows = [(record["step"], record[key]) for record in self.train if isinstance(record.get(key), list)]
        # A run whose number of experts was changed half-way keeps the records of its last shape.
        rows = [(step, load) for step, load in rows if load and len(load) == len(rows[-1][1])]
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        return steps, np.array([[_number(share) for share in load] for _, load in rows], dtype=np.float64)


def series(records: Sequence[Record], value: Callable[[Record], object]) -> Series:
    """Return ``value`` of each record over its step; what is not finite becomes NaN."""
    steps = np.array([record["step"] for record in records], dtype=np.int64)
    return Series(steps, np.array([_number(value(record)) for record in records], dtype=np.float64))


def _number(value: object) -> float:
    real = finite(value)
    return float("nan") if real is None else real


def _by_step(records: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the records of ``kind`` in order of step; of two lives' records of one step the later counts."""
    newest = {record["step"]: record for record in records if record["kind"] == kind}
    return [newest[step] for step in sorted(newest)]


def _text(path: Path) -> str:
    """Return the file's text, or nothing when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(parse: Callable[[str], Any], text: str) -> dict[str, Any]:
    """Return the mapping that ``text`` holds, or an empty one."""
    try:
        content = parse(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
