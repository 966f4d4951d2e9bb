"""Work that succeeds on all ranks, or fails on all with the same error: no rank waits for one that failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

from torch.distributed.checkpoint.api import CheckpointException

from moe_train.dist.world import World
from moe_train.errors import CheckpointError, Problem, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")


def together(world: World, doing: str, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank and return this rank's result. Collective.

    Args:
        world: the processes.
        doing: what the work is, for the message: "writing tensors".
        work: may raise; may itself be collective, provided that it then fails on all ranks.

    Raises:
        CheckpointError: on all ranks, when the work failed on one; lists the problems of all of them once.
    """
    failure: BaseException | None = None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # the latter, torch's own, is no Exception
        failure = error
    problems = world.gather(problems_of(failure, doing, world.rank))
    merged = list(dict.fromkeys(problem for some in cast(list[list[Problem]], problems) for problem in some))
    if merged:
        raise CheckpointError(merged) from failure
    return result


def on_leader(world: World, doing: str, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank. Collective; errors as in `together`."""
    result = together(world, doing, lambda: work() if world.is_leader else None)
    return cast(T, world.broadcast(result))


def problems_of(failure: BaseException | None, doing: str, rank: int) -> list[Problem]:
    """Return what ``failure`` says as problems that can be sent to other ranks; none for None."""
    if failure is None:
        return []
    if isinstance(failure, UserError):
        return list(failure.problems)
    if isinstance(failure, CheckpointException):
        causes = failure.failures.items()
        return [problem for where, (cause, _) in causes for problem in problems_of(cause, doing, where)]
    if isinstance(failure, OSError):
        remedy = "see to the disk, its space and its permissions"
    else:
        # Nobody expected this one: the message alone would hide where it comes from.
        logger.error("%s failed on rank %d", doing, rank, exc_info=failure)
        remedy = "see the traceback of that rank"
    return [Problem(f"{doing} on rank {rank}", None, f"{type(failure).__name__}: {failure}", remedy)]
