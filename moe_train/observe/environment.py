"""What a run ran on: ``environment.json``, enough to tell two machines apart and to start the run again."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import moe_train
from moe_train.config.process import told_settings
from moe_train.observe.redact import redact, redact_command

BYTES_PER_GIB = 1024**3
GIT_TIMEOUT_S = 5

PACKAGES = (
    "torch",
    "deepspeed",
    "triton",
    "numpy",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "datasets",
    "tokenizers",
    "safetensors",
    "wandb",
    "rich",
    "matplotlib",
    "psutil",
)

# An allowlist: what is not named here is not stored, so that no secret of an unknown name can slip through.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
    "GLOO_SOCKET_IFNAME",
    "GROUP_RANK",
    "LD_PRELOAD",
    "LOCAL_WORLD_SIZE",
    "MALLOC_ARENA_MAX",
    "MALLOC_CONF",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "MOE_TRAIN_SETTINGS",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "WANDB_MODE",
    "WORLD_SIZE",
)


def environment(accelerator: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the description of this process and machine, as JSON-ready values; a part that is unknown is None.

    Args:
        accelerator: what the caller knows of its device (name, memory, driver, ...); None for a CPU run.
    """
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact_command(sys.orig_argv),
        "working_folder": str(Path.cwd()),
        "git": git_state(Path(moe_train.__file__).parent) or git_state(Path.cwd()),
        "python": platform.python_version(),
        "packages": {"moe_train": moe_train.__version__, **package_versions()},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "memory_gib": memory_gib(),
        "accelerator": dict(accelerator) if accelerator is not None else None,
        "settings": told_settings(os.environ),
        "variables": {name: redact(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that a run's numbers can depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and dirty flag of the git checkout that ``folder`` lies in, or None when there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def cpu() -> dict[str, Any]:
    """Return model and core counts of the processor: all cores, and those this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": usable}


def memory_gib() -> float:
    """Return the machine's main memory, in GiB."""
    import psutil

    return round(psutil.virtual_memory().total / BYTES_PER_GIB, 1)


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None when it is missing, slow or refuses."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_model() -> str | None:
    """Return the processor's name; Linux keeps it where ``platform`` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()) or None
