"""What every command of the package has in common: Hydra's command line, one error report, the exit status."""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from pydantic import BaseModel

from moe_train.config.compose import compose_config, register, to_mapping, unstated, validated, with_force
from moe_train.config.groups import config_dir
from moe_train.config.validate import Prepare, Rules, as_composed
from moe_train.errors import UserError

Schema = TypeVar("Schema", bound=BaseModel)

QUIET = [
    # Every rank is a Hydra application of its own: none may make folders or log files; rank 0 makes the run folder.
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
]
SHOWING = frozenset({"--cfg", "-c", "--help", "-h"})
"""Flags of Hydra that show the configuration instead of running."""
USER_MISTAKE = 2
"""Exit status of a mistake in configuration or input."""
LEADER_SPEAKS_S = 5.0
"""How long the other ranks wait for rank 0 to tell the user, in seconds."""


def door(
    name: str,
    schema: type[Schema],
    rules: Rules[Schema] = lambda config: [],
    prepare: Prepare = as_composed,
    shorthands: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Make a function of a validated configuration into a command.

    Args:
        name: the primary YAML file under configs/.
        schema: the model that the composed configuration must fit.
        rules: what must hold across fields; returns every problem.
        prepare: completes the composed mapping before it is validated.
        shorthands: keys that stand for others on the command line. Hydra takes a key for a group wherever a folder of
            that name exists, also for a command that does not know the group.

    Returns:
        A decorator. The command prints all mistakes of a user at once, without a traceback, and exits with status 2.
    """

    def decorate(main: Callable[[Schema], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def command() -> None:
            arguments = [written_out(argument, shorthands) for argument in sys.argv[1:]]
            register(name, schema)
            sys.argv = [sys.argv[0], *hydra_arguments(arguments, completion(name, schema, arguments))]
            guarded(lambda: check(name, schema, rules, prepare, arguments))
            job = functools.partial(run_job, main, schema, rules, prepare, arguments)
            functools.update_wrapper(job, main)
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)()

        return command

    return decorate


def written_out(argument: str, shorthands: Mapping[str, str]) -> str:
    """Return an override with the key that its own key stands for."""
    key, equals, value = argument.partition("=")
    plain = key.lstrip("+")
    return f"{shorthands[plain]}={value}" if equals and plain in shorthands else argument


def completion(name: str, schema: type[BaseModel], arguments: list[str]) -> list[str]:
    """Return the overrides with which Hydra shows every key of the configuration, when showing is what it is asked."""
    if not any(argument.partition("=")[0] in SHOWING for argument in arguments):
        return []
    return unstated(name, schema, [argument for argument in arguments if "=" in argument and argument[0] != "-"])


def hydra_arguments(arguments: list[str], settings: list[str]) -> list[str]:
    """Return the command line for Hydra: every key allowed, and our settings among the overrides.

    argparse takes positional arguments in one run only, so that ours stand beside the first override of the user.
    """
    forced = [with_force(argument) for argument in arguments]
    first = next((i for i, a in enumerate(forced) if "=" in a and not a.startswith("-")), len(forced))
    # A sweep leaves a record of Hydra's (multirun.yaml, with paths of the machine): not in the user's folder.
    record = f"hydra.sweep.dir={Path(tempfile.gettempdir()) / f'moe_train-sweep-{os.getpid()}'}"
    return [*forced[:first], *QUIET, record, *settings, *forced[first:]]


def check(name: str, schema: type[Schema], rules: Rules[Schema], prepare: Prepare, arguments: list[str]) -> None:
    """Compose once before Hydra does: it would stop at its first problem, with exit status 1."""
    if any(argument.startswith("-") for argument in arguments):
        return
    try:
        compose_config(name, schema, rules, arguments, prepare)
    except UserError as error:
        error.shared = True  # all ranks have the same command line
        raise


def run_job(
    main: Callable[[Schema], None],
    schema: type[Schema],
    rules: Rules[Schema],
    prepare: Prepare,
    arguments: list[str],
    composed: DictConfig,
) -> None:
    """Validate what Hydra composed for one job and run it."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        name_sweep_job(composed, arguments)
    overrides = list(HydraConfig.get().overrides.task)
    guarded(lambda: main(validated(to_mapping(composed), schema, rules, prepare, overrides)))


def name_sweep_job(composed: DictConfig, arguments: list[str]) -> None:
    """Give each job of a sweep a run name of its own, from what was swept: two jobs must not share a folder."""
    given = {with_force(argument) for argument in arguments}
    if any(override.lstrip("+").startswith(("run.name=", "run.dir=")) for override in given):
        return
    swept = [o.lstrip("+") for o in HydraConfig.get().overrides.task if o not in given]
    # model=dense_tiny,run.seed=0 becomes model_dense_tiny-seed_0
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(o.rpartition("run.")[2] for o in swept))[:80]
    with open_dict(composed):
        composed.run.name = f"{composed.run.name}-{label or HydraConfig.get().job.num}"


def guarded(work: Callable[[], Any]) -> None:
    """Run ``work``; print a user's mistakes once and exit with status 2.

    An error that only one rank has (its disk, its file) is printed by that rank.
    """
    try:
        work()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.shared:
            speaker = "" if rank == "0" else f"[rank {rank}] "
            sys.stderr.write(f"{speaker}{error.report()}\n")  # in one piece: the ranks' lines must not mix
        else:
            time.sleep(LEADER_SPEAKS_S)  # torchrun terminates rank 0 as soon as this one ends
        let_go(error)
        sys.exit(USER_MISTAKE)


def let_go(error: BaseException) -> None:
    """Free what the calls that failed had in hand, while Python is whole.

    A model and a mesh that know each other keep process groups until the interpreter is taken down. A thread of gloo
    that frees a tensor at that moment aborts the process: "terminate called without an active exception", status -6
    (pytorch/pytorch issue 190489). A group that ends before joins its threads.
    """
    links = [error]
    for link in links:  # grows meanwhile
        traceback.clear_frames(link.__traceback__)
        links += [other for other in (link.__cause__, link.__context__) if other is not None and other not in links]
    gc.collect()
