"""An agent that computes in this process: a run of this project, or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from moe_train.agents.agent import AgentError, Answer, Attempt, Message, Tell

Complete: TypeAlias = Callable[[Sequence[Message], int], Answer]
"""Computes the answer to messages with a seed."""


@dataclass(frozen=True)
class LocalAgent:
    """A model in memory.

    Attributes:
        name: in the mixture.
        is_chat: whether it takes messages of a chat.
        timeout_s: longest time of an answer, in seconds.
        model: what computes.
        complete: computes an answer with it.
    """

    name: str
    is_chat: bool
    timeout_s: float
    model: nn.Module
    complete: Complete
    is_local: bool = True

    def ask(self, messages: Sequence[Message], seed: int, tell: Tell) -> Answer:
        """Return the answer.

        Raises:
            AgentError: it is late, empty, or the model failed. There is one attempt: the next would be no other.
        """
        start_s = time.monotonic()
        try:
            with expiring(self.model, self.timeout_s):
                answer = self.complete(messages, seed)
        except Exception as error:  # whatever a model of somebody else's may raise: the others go on
            fault = str(error) if isinstance(error, AgentError) else f"{type(error).__name__}: {error}"
            tell(Attempt(time.monotonic() - start_s, fault))
            raise AgentError(fault) from error
        tell(Attempt(time.monotonic() - start_s))
        return answer


@contextlib.contextmanager
def expiring(model: nn.Module, seconds: float) -> Iterator[None]:
    """Let a model compute for so many seconds: the first forward pass after them raises.

    A thread that computes cannot be ended from outside, but text is made token by token.
    """
    end_s = time.monotonic() + seconds

    def check(*_: Any) -> None:
        if time.monotonic() > end_s:
            raise AgentError(f"no answer in {seconds:.3g} s")

    hook = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
