"""Checks of what a caller passes to a layer: all problems at once, each under the name of its argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from moe_train.errors import ConfigError, Problem


def check(*found: list[Problem]) -> None:
    """Raise a `ConfigError` with all problems, if there are any."""
    problems = [problem for problems in found for problem in problems]
    if problems:
        raise ConfigError(problems)


def refused(
    values: Mapping[str, float], allowed: Callable[[float], bool], rule: str, remedy: str = "change it"
) -> list[Problem]:
    """Return a problem for each of the arguments that is not allowed."""
    return [Problem(name, value, rule, remedy) for name, value in values.items() if not allowed(value)]


def positive(**values: float) -> list[Problem]:
    """Refuse what is not above zero, or not finite."""
    return refused(values, lambda value: 0 < value < math.inf, "must be greater than 0")


def not_negative(**values: float) -> list[Problem]:
    """Refuse what is below zero, or not finite."""
    return refused(values, lambda value: 0 <= value < math.inf, "must not be negative")


def fraction(**values: float) -> list[Problem]:
    """Refuse what is not in [0, 1)."""
    return refused(values, lambda value: 0 <= value < 1, "must be at least 0 and less than 1")


def at_most(name: str, limit: int, **values: int) -> list[Problem]:
    """Refuse what exceeds another argument."""
    return refused(values, lambda value: value <= limit, f"must not exceed {name}={limit}", "lower it")


def divides(name: str, whole: int, **values: int) -> list[Problem]:
    """Refuse what does not divide another argument."""
    return refused(values, lambda value: value < 1 or whole % value == 0, f"must divide {name}={whole}")


def one_of(allowed: Collection[str], **values: str) -> list[Problem]:
    """Refuse what is none of the words allowed."""
    rule = f"must be one of {', '.join(allowed)}"
    return [Problem(name, value, rule, "choose one of them") for name, value in values.items() if value not in allowed]
