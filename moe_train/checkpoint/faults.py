"""Places where a test can make a save fail, so that the promises about crashes are tested at the crash itself."""

from __future__ import annotations

import errno
import os
import signal
from typing import Literal, get_args

FAULT_VARIABLE = "MOE_TRAIN_FAULT"

FaultPoint = Literal[
    "ckpt.before_temp",
    "ckpt.before_tensors",
    "ckpt.before_manifest",
    "ckpt.before_rename",
    "ckpt.before_prune",
    "ckpt.mid_prune",
]
FAULT_POINTS: tuple[FaultPoint, ...] = get_args(FaultPoint)
"""In the order in which a save passes them."""


def fault_point(point: FaultPoint) -> None:
    """Do nothing, unless the environment says ``MOE_TRAIN_FAULT=<point>:<kill or raise>``.

    Raises:
        OSError: no space left on device, when the action is ``raise``. ``kill`` ends this process with SIGKILL.
    """
    wanted, _, action = os.environ.get(FAULT_VARIABLE, "").partition(":")
    if wanted != point:
        return
    assert action in ("kill", "raise"), f"{FAULT_VARIABLE} wants the action kill or raise, not {action!r}"
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
