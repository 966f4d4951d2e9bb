"""What a suite found: one row per variant and case, each with its times, what else is known, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moe_train.benchmark.timing import Ratio, Times

VARIANT = "variant"
"""The label by which rows of one case differ; the other labels are the case."""


@dataclass(frozen=True)
class Row:
    """One variant in one case.

    Attributes:
        labels: which: ``variant`` and the case (``shape``, ``routing``, ...), as the table's columns show them.
        times: what was measured; None when it could not be: the note says why.
        facts: numbers to know beside the times (bytes, FLOPs, errors); every row of a suite need not have the same.
        note: what a reader must know: what differs, what is missing, what went wrong.
        setting: under which of several settings (allocators) the times are; empty: there was no choice.
        others: times under the settings that were slower, by name.
    """

    labels: Mapping[str, str]
    times: Times | None
    facts: Mapping[str, float]
    note: str = ""
    setting: str = ""
    others: Mapping[str, Times] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """Name of the variant; empty when the suite has none."""
        return self.labels.get(VARIANT, "")

    @property
    def case(self) -> dict[str, str]:
        """All labels but the variant."""
        return {label: value for label, value in self.labels.items() if label != VARIANT}


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found.

    Attributes:
        name: of the suite; of its files, too.
        about: what was timed beside what, in a sentence or two for above the table.
        baseline: variant to which the others of the same case are compared; empty: to none.
        rows: in the table's order.
    """

    name: str
    about: str
    baseline: str
    rows: tuple[Row, ...]

    def ratio_of(self, row: Row) -> Ratio | None:
        """Return a row's speed relative to the baseline of its case, round by round; None where either is missing.

        Both must have been timed in the same rounds.
        """
        alike = (other for other in self.rows if other.variant == self.baseline and other.case == row.case)
        base = next(alike, None) if self.baseline else None
        if base is None or base.times is None or row.times is None:
            return None
        return row.times.ratio_to(base.times)


def growing(name: str, about: str, baseline: str, cases: Iterable[Sequence[Row]]) -> Iterator[SuiteResult]:
    """Yield what is known after each case, so that nothing is lost when a long suite is ended early.

    Args:
        name: see `SuiteResult`, as the next two.
        about: there.
        baseline: there.
        cases: rows of one case after the other; each is timed when it is asked for.
    """
    rows: list[Row] = []
    for case in cases:
        rows += case
        yield SuiteResult(name, about, baseline, tuple(rows))


def finished(results: Iterable[SuiteResult]) -> SuiteResult:
    """Run a suite to its end and return what it found."""
    *_, last = results
    return last
