"""A real HTTP server on the loopback interface that speaks the chat-completions protocol, with faults on demand."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch import free_port

Reply = Callable[["Handler"], None]


@dataclass
class Request:
    """What a client sent."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    def contents(self) -> list[str]:
        return [message["content"] for message in self.body["messages"]]


@dataclass
class ChatServer:
    """Answers each request with the next of its replies; the last one for ever."""

    replies: list[Reply]
    requests: list[Request] = field(default_factory=list)
    base_url: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, request: Request) -> Reply:
        with self.lock:
            self.requests.append(request)
            return self.replies[min(len(self.requests), len(self.replies)) - 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    chat: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.body = body
        reply = self.chat.take(Request(self.path, dict(self.headers), body))
        with self.chat.lock:
            self.chat.busy += 1
            self.chat.most_busy = max(self.chat.most_busy, self.chat.busy)
        try:
            with contextlib.suppress(OSError):  # a client that gave up
                reply(self)
        finally:
            with self.chat.lock:
                self.chat.busy -= 1

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def send(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def says(text: str, finish: str = "stop") -> Reply:
    """An answer, in pieces if the client asked for them."""

    def reply(handler: Handler) -> None:
        if handler.body.get("stream"):
            streams(*events(text, finish))(handler)
        else:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            handler.send(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

    return reply


def event(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


def events(text: str, finish: str = "stop") -> list[bytes]:
    """The events of a stream, a word each, with a comment between them as servers send to keep a line open."""
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    words = [event(content=f"{word} ") for word in text.split(" ")]
    usage = b'data: {"choices": [], "usage": {"total_tokens": 9}}\n\n'
    return [event(role="assistant"), *words, b": still here\n\n", b"data: " + json.dumps(end).encode() + b"\n\n",
            usage, b"data: [DONE]\n\n"]  # fmt: skip


def streams(*pieces: bytes, pause_s: float = 0.0) -> Reply:
    """A stream of server-sent events that ends when the server closes the connection."""

    def reply(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Connection", "close")
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause_s)

    return reply


def refuses(status: int, message: str = "no", **headers: str) -> Reply:
    """A refusal, as OpenAI words it."""
    body = json.dumps({"error": {"message": message, "type": "test"}}).encode()
    return lambda handler: handler.send(status, body, **headers)


def sends(body: bytes, kind: str = "application/json") -> Reply:
    """Status 200 with any body."""
    return lambda handler: handler.send(200, body, kind)


def hangs(handler: Handler) -> None:
    """Nothing, until the test is over."""
    handler.chat.released.wait(30.0)


def drips(handler: Handler) -> None:
    """A byte now and then: no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.chat.released.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def breaks_off(handler: Handler) -> None:
    """A body that is shorter than was promised."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


@contextlib.contextmanager
def serving(*replies: Reply) -> Iterator[ChatServer]:
    """Run a server as long as the context lasts; its address is ``base_url``."""
    chat = ChatServer(list(replies))
    handler = type("OwnHandler", (Handler,), {"chat": chat})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        chat.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield chat
        finally:
            chat.released.set()
            server.shutdown()


def dead_url() -> str:
    """The address of a port that nobody listens on."""
    return f"http://127.0.0.1:{free_port()}/v1"
