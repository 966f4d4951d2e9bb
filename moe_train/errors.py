"""Errors that users see: each says where the mistake is, what stood there, which rule it breaks and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake, on one line.

    Attributes:
        key: what is wrong: a config key (``model.ffn.top_k``), a command line argument or a file.
        value: what stood there; None when nothing did.
        rule: the rule that it breaks, as a statement.
        remedy: what to do instead, as an instruction.
    """

    key: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        shown = self.key if self.value is None else f"{self.key}={self.value}"
        return f"{shown}: {self.rule}; {self.remedy}"


class UserError(Exception):
    """A mistake outside the program: doors print it without a traceback and exit with status 2."""

    title = "error"
    shared = False
    """True when every rank raises the same error: one of them is enough to tell the user."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        assert self.problems, "an error needs at least one problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        """Travel between processes by the problems: the message alone does not make an error."""
        return type(self), (self.problems,)

    def report(self) -> str:
        """Return the whole message: a headline with the count, then one line per problem."""
        count = len(self.problems)
        lines = [f"{self.title}: {count} problem{'s' if count > 1 else ''}"]
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


class ConfigError(UserError):
    """A wrong key, value or combination of values in the configuration."""

    title = "configuration error"


class DataError(UserError):
    """Data that is missing, empty, unreadable or too short."""

    title = "data error"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the run."""

    title = "checkpoint error"
