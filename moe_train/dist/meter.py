"""What the exchange of this process costs: bytes by the link that they take, and time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class Meter:
    """What the exchange of this process has cost since the last reset.

    Attributes:
        node_size: consecutive ranks of a node, for the two counts of bytes by link; None: all ranks are one node.
        sent_bytes: bytes for other ranks and for itself, whether or not the latter pass through a collective.
        inside_bytes: those for other ranks of this rank's node.
        between_bytes: those for ranks of other nodes. What each rank is to get counts as if it were sent straight.
        calls: number of exchanges.
        seconds: time on the CPU backend, waiting for slower ranks included, but not what other work has hidden.
        events: pairs of device events around the exchanges, on an accelerator; read when the record is written.
    """

    node_size: int | None = None
    sent_bytes: int = 0
    inside_bytes: int = 0
    between_bytes: int = 0
    calls: int = 0
    seconds: float = 0.0
    events: list[tuple[torch.Event, torch.Event]] = field(default_factory=list)

    def take_ms(self) -> float:
        """Return the milliseconds since the last call and start again. Waits for the device."""
        for start, end in self.events:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000.0
        total_ms = self.seconds * 1000.0
        self.seconds, self.sent_bytes, self.inside_bytes, self.between_bytes, self.calls = 0.0, 0, 0, 0, 0
        self.events.clear()
        return total_ms

    def count(self, group: dist.ProcessGroup, bytes_P: Sequence[int]) -> None:
        """Count a collective that gives each rank of the group so many bytes."""
        self.calls += 1
        self.sent_bytes += sum(bytes_P)
        own = dist.get_rank()
        for rank, sent_bytes in zip(dist.get_process_group_ranks(group), bytes_P, strict=True):
            if self.node_size is not None and rank // self.node_size != own // self.node_size:
                self.between_bytes += sent_bytes
            elif rank != own:
                self.inside_bytes += sent_bytes

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Time the collective in the block, or the wait for it; on an accelerator without waiting for it."""
        if device.type == "cpu":
            start_s = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start_s
            return
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((start, end))


METER = Meter()
"""Per process, because the backward pass of the operators has no other place to report to."""
