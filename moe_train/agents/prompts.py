"""What the agents of a layer are sent: the request, and the answers of the layer below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.agents.agent import Message


@dataclass(frozen=True)
class Prompt:
    """What one layer works on.

    Attributes:
        request: of the user; every layer gets it, word by word.
        synthesis: what to do with the answers.
        answers: of the layer below, in its order; none in the first layer.
    """

    request: str
    synthesis: str
    answers: Sequence[str] = ()

    def as_chat(self) -> tuple[Message, ...]:
        """Return it as a chat: what to do and the answers as system message, the request as the user's."""
        user = Message("user", self.request)
        return (Message("system", self.aggregate()), user) if self.answers else (user,)

    def as_text(self) -> tuple[Message]:
        """Return it as one text. The request comes last: a model that continues text goes on from there."""
        above = f"{self.aggregate()}\n\n" if self.answers else ""
        return (Message("text", above + self.request),)

    def aggregate(self) -> str:
        """Return the aggregate-and-synthesise prompt (arXiv 2406.04692, table 1) with the numbered answers."""
        return "\n".join([self.synthesis, *(f"{number}. {text}" for number, text in enumerate(self.answers, 1))])


def cut_note(tokens: int, read: int) -> str:
    """Return the note on a prompt that is longer than what a model reads, in tokens; empty where it is not."""
    return f"the prompt has {tokens} tokens, the model reads the last {read}" if tokens > read else ""
