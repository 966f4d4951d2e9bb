"""What an agent is to a mixture: something that answers messages, in time or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias


@dataclass(frozen=True)
class Message:
    """A piece of what an agent is sent.

    Attributes:
        role: ``system`` or ``user`` of a chat; ``text`` for a model that continues text, which gets one message.
        content: its text.
    """

    role: Literal["system", "user", "text"]
    content: str


@dataclass(frozen=True)
class Answer:
    """What an agent said.

    Attributes:
        text: without white space at its ends.
        finish: why it ended: ``stop``, ``length``, or whatever an endpoint says; None: not told.
        note: what the reader of a transcript should know of it, as a sentence; empty: nothing.
    """

    text: str
    finish: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Attempt:
    """One try to get an answer.

    Attributes:
        seconds: that it took.
        fault: why it failed; None: it did not.
        wait_s: wait after it before the next, in seconds; 0 when there is none.
    """

    seconds: float
    fault: str | None = None
    wait_s: float = 0.0


class AgentError(Exception):
    """An agent did not answer.

    Attributes:
        is_passing: whether the next attempt may succeed.
        wait_s: least wait before it that was asked for, in seconds.
    """

    def __init__(self, fault: str, is_passing: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(fault)
        self.is_passing = is_passing
        self.wait_s = wait_s


Tell: TypeAlias = Callable[[Attempt], None]
"""Gets each attempt as soon as it is over."""


class Agent(Protocol):
    """Answers messages."""

    @property
    def name(self) -> str:
        """Its name in the mixture."""

    @property
    def is_chat(self) -> bool:
        """Whether it takes messages of a chat; else it continues one text."""

    @property
    def is_local(self) -> bool:
        """Whether it computes in this process, where one model runs at a time."""

    def ask(self, messages: Sequence[Message], seed: int, tell: Tell) -> Answer:
        """Return the answer.

        Args:
            messages: of a chat, or the one text to continue.
            seed: number of the call in the mixture; equal calls with other seeds should give other answers.
            tell: gets each attempt.

        Raises:
            AgentError: there is none, in the time that the agent has.
        """


def require_text(text: str) -> str:
    """Return a text without white space at its ends.

    Raises:
        AgentError: nothing is left; it would be an answer that says nothing to the layer above.
    """
    if not text.strip():
        raise AgentError("the answer is empty")
    return text.strip()
