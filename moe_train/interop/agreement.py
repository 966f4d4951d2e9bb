"""Work with files that ends on all ranks alike: with results, or with the problems of all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

from moe_train.dist.world import World
from moe_train.errors import DataError, Problem, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

SHOWN = 20
"""Problems of a kind that are listed one by one; the others are counted."""


def reading(world: World, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank and return this rank's result. Collective.

    Raises:
        DataError: on all ranks, when a user's mistake or a disk failed the work on one; what they found, once.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
        if not isinstance(error, UserError):
            # Nobody expected this one: the message alone would hide where it comes from.
            logger.error("reading failed on rank %d", world.rank, exc_info=error)
    mine = list(failure.problems) if isinstance(failure, UserError) else []
    found = cast(list[list[Problem]], world.gather(mine))
    merged = list(dict.fromkeys(problem for some in found for problem in some))
    world.agree(DataError(merged) if merged else failure)
    return result


def shortened(problems: Iterable[Problem], what: str) -> list[Problem]:
    """Return the problems, a long list cut: a folder of another model lacks thousands of tensors."""
    listed = list(problems)
    if len(listed) <= SHOWN:
        return listed
    last = listed[SHOWN - 1]
    more = f"and {len(listed) - SHOWN + 1} more {what}"
    return [*listed[: SHOWN - 1], Problem(last.key, None, more, last.remedy)]
