"""The chat-completions protocol: what is asked, and how an answer is read, whole or in pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_train.agents.agent import AgentError, Answer, Message, require_text
from moe_train.agents.events import EventReader

DONE = "[DONE]"
"""Data of the event that ends a stream."""
MOST_SHOWN = 300
"""Characters of a server's message that are worth showing."""


def request_body(
    model: str, messages: Sequence[Message], temperature: float | None, max_tokens: int | None, stream: bool
) -> bytes:
    """Return the body of a request; what is None is left to the endpoint."""
    options = {"temperature": temperature, "max_tokens": max_tokens, "stream": stream or None}
    body = {"model": model, "messages": [asdict(message) for message in messages]}
    return json.dumps(body | {name: value for name, value in options.items() if value is not None}).encode()


def whole_answer(body: bytes) -> Answer:
    """Read an answer that came in one piece.

    Raises:
        AgentError: it is no such answer, or an empty one.
    """
    reply = parsed(body.decode("utf-8", errors="replace"))
    choice = first_choice(reply)
    message = choice.get("message") if choice else None
    text = message.get("content") if isinstance(message, dict) else None
    if choice is None or not isinstance(text, str):
        raise AgentError(f"the answer holds no text: {shortened(body.decode('utf-8', errors='replace'))}")
    return Answer(require_text(text), finish_of(choice))


class StreamedAnswer:
    """An answer that comes in pieces.

    Attributes:
        is_complete: whether its end has been seen.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._events = EventReader()
        self._pieces: list[str] = []
        self._finish: str | None = None

    def feed(self, piece: bytes) -> None:
        """Take bytes as they arrive.

        Raises:
            AgentError: the server reports an error, or sends something else than events of this protocol.
        """
        for data in self._events.feed(piece):
            if data.strip() == DONE:
                self.is_complete = True
            elif not self.is_complete:
                self._take(parsed(data))

    def answer(self) -> Answer:
        """Return the whole answer, when no more bytes will come.

        Raises:
            AgentError: the stream broke off (some servers send no ``[DONE]``, but a reason to finish), or is empty.
        """
        if not self.is_complete and self._finish is None:
            raise AgentError(f"the stream broke off after {len(''.join(self._pieces))} characters", is_passing=True)
        return Answer(require_text("".join(self._pieces)), self._finish)

    def _take(self, event: dict[str, Any]) -> None:
        if event.get("error"):
            raise AgentError(f"error in the stream: {error_message(event)}", is_passing=True)
        choice = first_choice(event)
        if choice is None:
            return  # the last event may hold nothing but counts of tokens
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(text, str):
            self._pieces.append(text)
        self._finish = finish_of(choice) or self._finish


def parsed(text: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        AgentError: it is none. Not passing: who speaks something else will do so again.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # the second: thousands of brackets
        value = None
    if not isinstance(value, dict):
        raise AgentError(f"the answer is not a JSON object: {shortened(text)}")
    return value


def first_choice(reply: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first of an answer's choices, or None."""
    choices = reply.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def finish_of(choice: dict[str, Any]) -> str | None:
    """Return why an answer ended."""
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) else None


def error_message(reply: dict[str, Any]) -> str:
    """Return what a server says of its error: ``{"error": {"message": ...}}``, or the like."""
    error = reply.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return shortened(message if isinstance(message, str) else json.dumps(reply))


def refusal_message(body: bytes) -> str:
    """Return what the body of a refusal says, in one line."""
    text = body.decode("utf-8", errors="replace")
    try:
        return error_message(parsed(text))
    except AgentError:
        return shortened(text)


def shortened(text: str) -> str:
    """Return a text as one line that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."
