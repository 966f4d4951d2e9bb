"""An agent behind HTTP: one POST per attempt, given up when it is late, tried again when that may help."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from moe_train.agents.agent import AgentError, Answer, Message, Tell
from moe_train.agents.chat import StreamedAnswer, refusal_message, request_body, whole_answer
from moe_train.agents.patience import Patience, within
from moe_train.config.agents import MixtureConfig, OpenAIAgent
from moe_train.config.agents_rules import address_of, key_variable_of
from moe_train.observe.redact import MASK, redact

MOST_BYTES = 16 * 1024 * 1024
"""Longest answer that is read: a server that does not end must not fill the memory."""
PIECE_BYTES = 64 * 1024
CONNECTION_FAULTS = (OSError, http.client.HTTPException, UnicodeError)  # the last: a host that no name server can have


@dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint that speaks the chat-completions protocol.

    Redirections are not followed: the key would go to somebody else.

    Attributes:
        name: in the mixture.
        config: of the agent.
        base_url: address up to and without ``/chat/completions``.
        key: sent with each request; None: none is. It is not part of anything that this class returns or raises.
        patience: how often and how long a call is tried.
    """

    name: str
    config: OpenAIAgent
    base_url: str
    key: str | None = field(repr=False)
    patience: Patience
    is_chat: bool = True
    is_local: bool = False

    def ask(self, messages: Sequence[Message], seed: int, tell: Tell) -> Answer:
        """Return the answer; the seed is not sent, for some endpoints refuse it.

        Raises:
            AgentError: there is none.
        """
        config = self.config
        body = request_body(config.model, messages, config.temperature, config.max_tokens, config.stream)
        return self.patience.persist(lambda left_s: self.attempt(body, min(config.timeout_s, left_s)), tell)

    def attempt(self, body: bytes, seconds: float) -> Answer:
        """Return the answer to one POST.

        Raises:
            AgentError: there is none in so many seconds.
        """
        post = Post(urlsplit(f"{self.base_url.rstrip('/')}/chat/completions"), seconds)
        try:
            answer = within(seconds, lambda: post.answer(self.headers(), body), post.abort)
        except CONNECTION_FAULTS as error:
            raise AgentError(self.clean(f"connection failed: {told(error)}"), is_passing=True) from None
        except AgentError as error:
            # "from None": a server may repeat the key in its message, which the first error still has.
            raise AgentError(self.clean(str(error)), error.is_passing, error.wait_s) from None
        return Answer(self.unkeyed(answer.text), answer.finish)

    def headers(self) -> dict[str, str]:
        """Return the headers of a request."""
        accepted = "text/event-stream" if self.config.stream else "application/json"
        headers = {"Content-Type": "application/json", "Accept": accepted, "User-Agent": "moe_train"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def clean(self, text: str) -> str:
        """Return a message without the key, or anything else that looks like a secret."""
        return redact(self.unkeyed(text))

    def unkeyed(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self.key, MASK) if self.key else text


def endpoint_of(name: str, agent: OpenAIAgent, mixture: MixtureConfig) -> Endpoint:
    """Return an agent behind an address; its key comes from the environment and goes nowhere but there."""
    _, address = address_of(name, agent, mixture)
    _, variable = key_variable_of(name, agent, mixture)
    assert address is not None, "the rules of the configuration require an address"
    key = os.environ[variable].strip() if variable is not None else None
    return Endpoint(name, agent, address, key, Patience(agent.retries, agent.backoff_s, agent.total_s))


class Post:
    """One POST and its answer. It may be given up from another thread.

    Args:
        address: of the request.
        seconds: longest silence of the other side.
    """

    def __init__(self, address: SplitResult, seconds: float) -> None:
        host = address.hostname or ""
        if address.scheme == "https":
            context = ssl.create_default_context()
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, address.port, timeout=seconds, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, address.port, timeout=seconds)
        self._path = address.path
        self._socket: socket.socket | None = None

    def answer(self, headers: dict[str, str], body: bytes) -> Answer:
        """Send a request and read its answer.

        Raises:
            AgentError: the server refuses, or says what is no answer.
            OSError, http.client.HTTPException: the connection cannot be made, or breaks.
        """
        with contextlib.closing(self._connection):
            self._connection.connect()
            self._socket = self._connection.sock  # the connection forgets it when the server closes after its answer
            self._connection.request("POST", self._path, body, headers)
            with self._connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    raise refusal(response.status, response.getheader("Retry-After"), response.read(PIECE_BYTES))
                is_stream = (response.getheader("Content-Type") or "").partition(";")[0].strip() == "text/event-stream"
                return read_stream(response) if is_stream else whole_answer(read_all(response))

    def abort(self) -> None:
        """End the exchange: what is read or written from now on fails."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class Readable(Protocol):
    """The part of a response that hands out its body."""

    length: int | None
    """Bytes that are still to come; None: not told."""

    def read1(self, n: int = -1) -> bytes:
        """Return at most ``n`` bytes, as soon as there are any; none at the end."""


def read_all(response: Readable) -> bytes:
    """Return a whole body.

    Raises:
        AgentError: it does not end.
        http.client.IncompleteRead: it ends too soon.
    """
    body = bytearray()
    each_piece(response, body.extend)
    return bytes(body)


def read_stream(response: Readable) -> Answer:
    """Return the answer of a stream of events, as soon as it says that it is complete.

    Raises:
        AgentError: the server reports an error, breaks off, or does not end.
    """
    streamed = StreamedAnswer()
    each_piece(response, streamed.feed, lambda: streamed.is_complete)
    return streamed.answer()


def each_piece(
    response: Readable, take: Callable[[bytes], object], is_enough: Callable[[], bool] = lambda: False
) -> None:
    """Hand on a body as it arrives, until it ends or is enough.

    Raises:
        AgentError: it is longer than any answer.
        http.client.IncompleteRead: it ends before its length.
    """
    size = 0
    while not is_enough() and (piece := response.read1(PIECE_BYTES)):
        size += len(piece)
        if size > MOST_BYTES:
            raise AgentError(f"the answer is longer than {MOST_BYTES} bytes")
        take(piece)
    if response.length and not is_enough():
        raise http.client.IncompleteRead(b"", response.length)


def refusal(status: int, retry_after: str | None, body: bytes) -> AgentError:
    """Return the error of a status other than 200: 429 and 5xx may pass, others are final (RFC 9110, section 15)."""
    is_passing = status == http.HTTPStatus.TOO_MANY_REQUESTS or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
    wait_s = seconds_of(retry_after) if is_passing and retry_after else 0.0
    return AgentError(f"status {status}: {refusal_message(body)}", is_passing, wait_s)


def seconds_of(retry_after: str, now_s: Callable[[], float] = time.time) -> float:
    """Return the wait that a Retry-After header asks for: seconds, or a date (RFC 9110, section 10.2.3); else 0."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.fromtimestamp(now_s(), UTC)).total_seconds())


def told(error: Exception) -> str:
    """Return a fault of the connection in words."""
    if isinstance(error, TimeoutError):
        return "the other side is silent"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
