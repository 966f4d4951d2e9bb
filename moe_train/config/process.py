"""What must stand in a process's environment before it starts: memory that is kept, and threads that are shared out.

``launch/settings.sh`` sets the same for the launchers; a command that was started without them starts itself anew, once
(`settle`). A variable that is set already is left alone, and ``MOE_TRAIN_SETTINGS=0`` leaves everything alone. This
module imports nothing but a little of the standard library: it is run before all others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SWITCH = "MOE_TRAIN_SETTINGS"
"""Environment variable: 0 switches all this off; else the names of what was set by us, with commas between."""
OFF = "0"
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
}
"""glibc hands every buffer over 32 MB back to the kernel and faults it in again at each step; with these, in bytes, it
keeps them."""
THREADS = "OMP_NUM_THREADS"
TOPOLOGY = Path("/sys/devices/system/cpu")


def settle(module: str) -> None:
    """Start this process anew, under the same id and command line, if it lacks settings; else return.

    Args:
        module: of the command; nothing happens unless Python was started with ``-m`` and its name. So tools that run it
            (debuggers, profilers) are not started anew.
    """
    main = sys.modules["__main__"]
    if getattr(getattr(main, "__spec__", None), "name", None) != module or SWITCH in os.environ:
        return
    missing = missing_settings(os.environ, uses_glibc())
    if not missing:
        return
    settled = {**os.environ, **missing, SWITCH: ",".join(missing)}
    try:
        # The path of this interpreter: a bare "python" might be another one, outside of the virtual environment.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], settled)
    except OSError:
        return  # slower, but it works


def missing_settings(environment: Mapping[str, str], has_glibc: bool) -> dict[str, str]:
    """Return the settings that an environment lacks, by name; none where they would mean nothing."""
    if not has_glibc:
        return {}
    wanted = MALLOC | {THREADS: str(threads_per_rank(local_ranks(environment)))}
    return {name: value for name, value in wanted.items() if name not in environment}


def uses_glibc() -> bool:
    """Whether this interpreter's memory comes from glibc's malloc: on most Linux, not on Alpine, macOS or Windows."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def local_ranks(environment: Mapping[str, str]) -> int:
    """Return how many ranks torchrun says that it runs on this machine, or 1."""
    told = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdigit() else 1


def threads_per_rank(ranks: int) -> int:
    """Return the cores of this machine over its ranks, at least 1."""
    return max(1, cores() // ranks)


def cores() -> int:
    """Return the physical cores that this process may use: two hardware threads of a core share its arithmetic."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        siblings = {path.read_text() for path in TOPOLOGY.glob("cpu[0-9]*/topology/thread_siblings_list")}
    except OSError:
        siblings = set()
    return min(allowed, len(siblings) or allowed)


def told_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return each setting with who made it, for people: ``{"OMP_NUM_THREADS": "2 (moe_train)", ...}``."""
    own = environment.get(SWITCH, "").split(",")
    return {name: told_setting(name, environment, name in own) for name in (*MALLOC, THREADS)}


def told_setting(name: str, environment: Mapping[str, str], is_own: bool) -> str:
    """Return the value of a setting and where it comes from."""
    value = environment.get(name)
    if value is None:
        return "unset"
    if is_own:
        return f"{value} (moe_train)"
    # torchrun sets it for its ranks where nobody has, and does not say so to them.
    is_torchrun = name == THREADS and value == "1" and local_ranks(environment) > 1
    return f"{value} ({'torchrun or the user' if is_torchrun else 'the user'})"


def settings_message(environment: Mapping[str, str]) -> str:
    """Return the settings as one line, with a remedy where they waste cores."""
    line = ", ".join(f"{name} {told}" for name, told in told_settings(environment).items())
    ranks = local_ranks(environment)
    shared = threads_per_rank(ranks)
    if ranks > 1 and environment.get(THREADS) == "1" and shared > 1:
        line += f"; {shared} threads per rank would use all cores: launch/local.sh sets them"
    return f"process settings: {line}" + (f"; {SWITCH}=0" if environment.get(SWITCH) == OFF else "")
