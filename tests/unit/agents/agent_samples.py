"""Agents that need no model: they say what they are told to, and remember what they were sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe_train.agents.agent import AgentError, Answer, Attempt, Message, Tell
from moe_train.agents.mixture import Mixture
from moe_train.agents.transcript import Transcript
from moe_train.config.agents import MixtureConfig


@dataclass
class Stub:
    """Answers its name and the number of the call, or fails."""

    name: str
    is_chat: bool = True
    is_local: bool = False
    fails: Callable[[int], bool] = lambda number: False
    pause_s: float = 0.0
    note: str = ""
    sent: list[tuple[Message, ...]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def ask(self, messages: Sequence[Message], seed: int, tell: Tell) -> Answer:
        number = len(self.sent)
        self.sent.append(tuple(messages))
        self.seeds.append(seed)
        time.sleep(self.pause_s)
        if self.fails(number):
            tell(Attempt(0.1, "out of order", 0.2))
            tell(Attempt(0.1, "still out of order"))
            raise AgentError("still out of order")
        tell(Attempt(0.1))
        return Answer(f"<{self.name} says {seed}>", "stop", self.note)


@dataclass
class Counter:
    """How many are at work, and how many were at most."""

    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.now -= 1


def config_of(layers: Sequence[Sequence[str]], aggregator: str) -> MixtureConfig:
    """A mixture of these names; what the agents are is of no interest."""
    return MixtureConfig.model_validate(
        {"agents": {}, "layers": layers, "aggregator": aggregator, "synthesis": "MERGE"}
    )


def mixture_of(
    agents: Sequence[Stub], layers: Sequence[Sequence[str]], aggregator: str, concurrency: int = 8
) -> tuple[Mixture, list[str]]:
    """Return a mixture of these agents, and the lines that it will tell."""
    told: list[str] = []
    transcript = Transcript("test", "2024-01-01T00:00:00+00:00", "the request", {})
    by_name = {agent.name: agent for agent in agents}
    return Mixture(config_of(layers, aggregator), by_name, concurrency, transcript, told.append, lambda: None), told
