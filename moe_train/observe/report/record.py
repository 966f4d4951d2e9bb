"""Everything a run folder says about its run, read once, with what is missing or torn left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moe_train.observe.records import (
    COUPLED,
    DEEP,
    ROUTED,
    Record,
    attending,
    feed_forward,
    finite,
    moe_layers,
    parse_record,
)
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
class Matrices:
    """Matrices between the experts of one layer, at one step.

    Attributes:
        step: optimizer step.
        values: float64 of shape (M, E, E), for a layer with M graph layers; NaN where the record had none.
    """

    step: int
    values: NDArray[np.float64]


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
    def has_classes(self) -> bool:
        """Whether the model tells the classes of texts."""
        return self.setting("task.kind") == "sentiment" or any("confusion" in record for record in self.evals)

    @property
    def loss_unit(self) -> str:
        """What one loss is of: ``token`` or ``text``."""
        return "text" if self.has_classes else "token"

    @property
    def layers(self) -> list[str]:
        """Names of the feed-forward layers with experts that a train record speaks of: ``["layer_01", "layer_03"]``."""
        return sorted({*self.routed_layers, *self.graph_layers})

    @property
    def routed_layers(self) -> list[str]:
        """Names of those with a router."""
        return feed_forward(self._layers_with(ROUTED))

    @property
    def attention_layers(self) -> list[str]:
        """Names of the parts of attention with a router: ``["layer_01_outputs", "layer_01_values"]``."""
        return attending(self._layers_with(ROUTED))

    @property
    def depth_layers(self) -> list[str]:
        """Names of the records of blocks that only some tokens pass: ``["layer_01_depth"]``."""
        return self._layers_with(DEEP)

    @property
    def graph_layers(self) -> list[str]:
        """Names of those whose experts are coupled by a graph."""
        return self._layers_with(COUPLED)

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
        """Return the expert loads of one MoE layer over the run: each expert's fraction of the assignments."""
        return self.rows(layer, ROUTED)

    def rows(self, layer: str, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return a list of figures of one layer with experts over the run.

        Returns:
            Steps of shape (N,), and values of shape (N, E) for lists of length E; NaN if unknown.
        """
        key = f"moe/{layer}/{name}"
        rows = [(record["step"], record[key]) for record in self.train if isinstance(record.get(key), list)]
        # A run whose number of experts was changed half-way keeps the records of its last shape.
        rows = [(step, row) for step, row in rows if row and len(row) == len(rows[-1][1])]
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        return steps, np.array([[_number(value) for value in row] for _, row in rows], dtype=np.float64)

    def first_and_last(self, layer: str, name: str) -> tuple[Matrices, Matrices] | None:
        """Return matrices between the experts of one layer from the first and the last record that has them.

        A single matrix is a stack of one; records of another shape than the last, or torn, are passed over.
        """
        key = f"moe/{layer}/{name}"
        last = next(self._matrices(key, reversed(self.train)), None)
        if last is None:
            return None
        shape = last.values.shape
        return next(found for found in self._matrices(key, self.train) if found.values.shape == shape), last

    def _layers_with(self, figure: str) -> list[str]:
        return moe_layers({key for record in self.train for key in record}, figure)

    def _matrices(self, key: str, records: Iterable[Record]) -> Iterator[Matrices]:
        """Yield what the records hold under ``key``, read only when asked for: there are many, and few are drawn."""
        for record in records:
            values = square_matrices(record.get(key))
            if values is not None:
                yield Matrices(record["step"], values)


def square_matrices(value: object) -> NDArray[np.float64] | None:
    """Return a matrix E x E, or a list of such, as (M, E, E) with NaN for what is unknown; None when it is neither.

    What has no finite number at all counts as nothing.
    """
    try:
        found = np.array(_numbers(value), dtype=np.float64)
    except ValueError:  # a row of another length
        return None
    found = found[None] if found.ndim == 2 else found
    whole = found.ndim == 3 and found.shape[1] == found.shape[2] and np.isfinite(found).any()
    return found if whole else None


def series(records: Sequence[Record], value: Callable[[Record], object]) -> Series:
    """Return ``value`` of each record over its step; what is not finite becomes NaN."""
    steps = np.array([record["step"] for record in records], dtype=np.int64)
    return Series(steps, np.array([_number(value(record)) for record in records], dtype=np.float64))


def _numbers(value: object) -> object:
    """Return nested lists with every entry a float."""
    return [_numbers(item) for item in value] if isinstance(value, list) else _number(value)


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
