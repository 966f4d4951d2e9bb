"""The command that starts a run again, from what ``environment.json`` recorded."""

from __future__ import annotations

import shlex
from typing import Any


def launch_command(environment: dict[str, Any]) -> str | None:
    """Return the command line of the whole run, or None when it was not recorded.

    A rank only knows its own command; the launcher around it is put back from the numbers of ranks it recorded.
    """
    words = environment.get("command")
    if not isinstance(words, list) or not words:
        return None
    words = [str(word) for word in words]
    ranks, ranks_per_node = _variable(environment, "WORLD_SIZE"), _variable(environment, "LOCAL_WORLD_SIZE")
    if "-m" not in words:
        return shlex.join(words)
    program = shlex.join(words[words.index("-m") :])
    if ranks <= 1:
        return f"python {program}"
    if ranks == ranks_per_node:
        return f"torchrun --standalone --nproc-per-node={ranks} {program}"
    nodes = ranks // max(ranks_per_node, 1)
    launcher = f"torchrun --nnodes={nodes} --nproc-per-node={ranks_per_node}"
    return f"{launcher} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT {program}"


def _variable(environment: dict[str, Any], name: str) -> int:
    """Return a recorded environment variable as a number; 1 when it is absent."""
    variables = environment.get("variables")
    value = variables.get(name) if isinstance(variables, dict) else None
    return int(value) if isinstance(value, str) and value.isdigit() else 1
