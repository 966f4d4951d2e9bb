"""A command under a cap on its memory: python offload_capped.py LIMIT_BYTES DOOR KEY=VALUE ...; 0: no cap.

The cap is RLIMIT_DATA: all private writable memory of the process, that is heap, anonymous maps and private writable
maps of files, the interpreter's and torch's own included. Read-only maps are not counted: their pages are the system's
cache and can be dropped at any time. RLIMIT_AS would count them, and address space that is only reserved.

At its end the process says how much it has of it, as `VmData BYTES`.
"""

from __future__ import annotations

import atexit
import re
import resource
import runpy
import sys
from pathlib import Path


def data_bytes() -> int:
    """What RLIMIT_DATA counts, now."""
    found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux says how much memory a process has"
    return int(found[1]) * 1024


if __name__ == "__main__":
    limit_bytes, door, *overrides = sys.argv[1:]
    if int(limit_bytes):
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit_bytes), int(limit_bytes)))
    atexit.register(lambda: sys.stderr.write(f"VmData {data_bytes()}\n"))
    sys.argv = [f"moe_train.{door}", *overrides]
    runpy.run_module(f"moe_train.{door}", run_name="__main__")
