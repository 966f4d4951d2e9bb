"""Names the rank that is gone.

A collective that fails says "connection closed" and a port. Here every process has a watcher thread that looks at the
shared store once a second; when a rank reports a failure, all who live answer, and whoever does not is named.
The thread answers while its main thread hangs in a collective; a stopped or killed process does not.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import time

from torch._C._distributed_c10d import Store

POLL_S = 1.0
"""Between two looks at the store: at 512 ranks the store answers 512 requests a second."""
ANSWER_S = 4.0
"""Time for the living to answer: several polls."""
GRACE_S = 10.0
"""After a failure elsewhere, time for the main thread to end by itself before the watcher ends the process."""


class RollCall:
    """The watcher of one rank.

    Args:
        store: a store that all ranks share, not used by anything else (its client blocks while another waits on it).
        rank: this rank.
        size: number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.ended = threading.Event()
        store.set(f"who/{rank}", f"rank {rank} (host {platform.node()}, pid {os.getpid()})")
        self.thread = threading.Thread(target=self.watch, name="rollcall", daemon=True)
        if size > 1:
            self.thread.start()

    def watch(self) -> None:
        """Answer when a rank reports a failure; end this process if its main thread does not."""
        while not self.ended.wait(POLL_S):
            try:
                if not self.store.check(["failure"]):
                    continue
                self.store.set(f"present/{self.rank}", "")
            except Exception:
                if not self.ended.is_set():
                    self.stop_orphan()
                return
            if not self.ended.wait(GRACE_S):
                self.explain(TimeoutError("another rank failed and this one hung in a collective"))
                os._exit(1)
            return

    def stop_orphan(self) -> None:
        """Ask this process to save and stop: the launcher, which kept the store, was killed.

        The connections between the ranks outlive it, so that they would train on, seen by nobody, and meet the next
        start of the same run in its folder.
        """
        self.say("the launcher is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    def explain(self, error: BaseException) -> None:
        """Report this rank's failure, wait for the others' answers and print one line with who is missing."""
        if self.size == 1:
            return
        if threading.current_thread() is threading.main_thread():
            # torchrun terminates the survivors as soon as it sees one rank dead; it waits 30 s before it kills them.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.ended.set()
        lost: list[str] = []
        with contextlib.suppress(Exception):  # a store that died with its host must not hide the error itself
            self.store.set(f"present/{self.rank}", "")
            first = self.store.compare_set("failure", "", f"{self.rank}: {cause}").decode()
            lost = self.missing()
            if not lost and not first.startswith(f"{self.rank}:"):
                cause = f"rank {first} (here: {cause})"
        line = f"lost {', '.join(lost)}; " if lost else ""
        self.say(f"run ended: {line}{cause}")

    def say(self, text: str) -> None:
        """Print a line for people.

        In one piece: unbuffered, ``print`` writes the end of its line by itself, and the ranks' lines mix.
        """
        sys.stderr.write(f"[rank {self.rank}] {text}\n")
        sys.stderr.flush()

    def missing(self) -> list[str]:
        """Return the names of the ranks which do not answer within ANSWER_S."""
        waiting = set(range(self.size))
        deadline = time.monotonic() + ANSWER_S
        while waiting and time.monotonic() < deadline:
            waiting = {rank for rank in waiting if not self.store.check([f"present/{rank}"])}
            time.sleep(0.1)
        return [self.store.get(f"who/{rank}").decode() for rank in sorted(waiting)]

    def close(self) -> None:
        """Stop watching.

        The watcher should be out of the store's C++ before Python is taken down: a thread that comes back from there
        later aborts the process (pytorch/pytorch issue 38228).
        """
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(POLL_S)  # no longer: a store whose host is gone answers nobody
