"""Agents behind HTTP, against a real server on the loopback interface that misbehaves in every way."""

import threading
import time

import pytest
from chat_server import (
    breaks_off,
    dead_url,
    drips,
    events,
    hangs,
    refuses,
    says,
    sends,
    serving,
    streams,
)

from launch import wait_until
from moe_train.agents.agent import AgentError, Answer, Message
from moe_train.agents.endpoint import Endpoint, endpoint_of
from moe_train.agents.patience import Patience
from moe_train.config.agents import MixtureConfig, OpenAIAgent

ASKED = [Message("system", "Synthesise."), Message("user", "What is 6 times 7?")]
KEY = "kq-93-not-to-be-seen"


def endpoint(base_url, key=KEY, retries=2, timeout_s=10.0, **options):
    config = OpenAIAgent(model="m", base_url=base_url, timeout_s=timeout_s, **options)
    return Endpoint("bob", config, base_url, key, Patience(retries, 0.01, 30.0))


def ask(agent):
    """Return what came of a call, and the fault of each attempt."""
    told = []
    try:
        outcome = agent.ask(ASKED, 0, told.append)
    except AgentError as error:
        outcome = error
    return outcome, [attempt.fault for attempt in told]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_and_what_was_asked(stream):
    with serving(says("It is 42.")) as chat:
        outcome, faults = ask(endpoint(chat.base_url, stream=stream, temperature=0.5, max_tokens=9))
    assert (outcome, faults) == (Answer("It is 42.", "stop"), [None])
    (request,) = chat.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Synthesise."}, {"role": "user", "content": "What is 6 times 7?"}],
        "temperature": 0.5,
        "max_tokens": 9,
    } | ({"stream": True} if stream else {})


def test_what_is_null_is_left_to_the_endpoint():
    with serving(says("Yes.")) as chat:
        ask(endpoint(chat.base_url + "/", key=None, temperature=None, max_tokens=None))
    (request,) = chat.requests
    assert request.body.keys() == {"model", "messages"} and "Authorization" not in request.headers
    assert request.path == "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_read_as_it_comes(stream):
    """A server need not do as it is asked: streams come unasked, and whole answers where a stream was wanted."""
    reply = sends(b'{"choices": [{"message": {"content": "whole"}}]}') if stream else streams(*events("in pieces"))
    with serving(reply) as chat:
        outcome, _ = ask(endpoint(chat.base_url, stream=stream))
    assert outcome.text == ("whole" if stream else "in pieces")


def test_a_stream_is_over_with_its_last_word():
    """The server keeps the connection open for seconds: who waited for its end would be late."""
    with serving(streams(*events("all of it"), b"", pause_s=0.0), hangs) as chat:
        chat.replies[0] = lambda handler: (streams(*events("all of it"))(handler), handler.chat.released.wait(20.0))
        outcome, faults = ask(endpoint(chat.base_url, stream=True, timeout_s=8.0))
    assert outcome.text == "all of it" and faults == [None]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (refuses(429, "slow down"), "status 429: slow down"),
        (refuses(500, "oops"), "status 500: oops"),
        (refuses(503), "status 503: no"),
        (breaks_off, "connection failed"),
        (streams(*events("cut off")[:2]), "broke off"),
        (streams(events("half")[1], b'data: {"error": {"message": "overloaded"}}\n\n'), "overloaded"),
        (streams(), "broke off"),
    ],
    ids=["429", "500", "503", "short body", "short stream", "error in stream", "empty stream"],
)
def test_what_may_pass_is_tried_again(fault, told):
    with serving(fault, fault, says("At last.")) as chat:
        outcome, faults = ask(endpoint(chat.base_url))
    assert outcome == Answer("At last.", "stop") and len(chat.requests) == 3
    assert told in faults[0] and told in faults[1] and faults[2] is None


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (refuses(400, "bad"), "status 400: bad"),
        (refuses(401, "who are you"), "status 401: who are you"),
        (refuses(404), "status 404"),
        (refuses(408), "status 408"),
        (refuses(302, Location="http://127.0.0.1:9/"), "status 302"),
        (sends(b"<html>hello</html>", "text/html"), "not a JSON object: <html>hello</html>"),
        (sends(b'{"choices": ['), "not a JSON object"),
        (sends(b'{"choices": []}'), "holds no text"),
        (says("  "), "empty"),
        (streams(b"data: {oops\n\n"), "not a JSON object"),
    ],
    ids=["400", "401", "404", "408", "302", "html", "malformed", "no choice", "blank", "malformed stream"],
)
def test_what_will_not_pass_is_not_tried_again(fault, told):
    with serving(fault, says("Never.")) as chat:
        outcome, faults = ask(endpoint(chat.base_url))
    assert isinstance(outcome, AgentError) and told in str(outcome)
    assert len(chat.requests) == len(faults) == 1


def test_retry_after_is_obeyed():
    with serving(refuses(429, Retry_After="1"), says("Now.")) as chat:
        start_s = time.monotonic()
        outcome, _ = ask(endpoint(chat.base_url))
    assert outcome == Answer("Now.", "stop") and 1.0 <= time.monotonic() - start_s < 5.0


@pytest.mark.parametrize("fault", [hangs, drips], ids=["silent", "dripping"])
def test_a_late_answer_is_a_time_out(fault):
    """Timeouts of a socket are per read: a server that sends a byte now and then would never have met one."""
    with serving(fault) as chat:
        start_s = time.monotonic()
        outcome, faults = ask(endpoint(chat.base_url, retries=1, timeout_s=0.3))
        assert 0.5 < time.monotonic() - start_s < 5.0
        wait_until(lambda: "attempt" not in {thread.name for thread in threading.enumerate()}, 5.0, "the thread's end")
    assert isinstance(outcome, AgentError) and len(chat.requests) == len(faults) == 2
    assert all("no answer in 0.3 s" in fault or "silent" in fault for fault in faults)


def test_an_endpoint_that_is_late_once():
    with serving(hangs, says("Here.")) as chat:
        outcome, faults = ask(endpoint(chat.base_url, timeout_s=0.3))
    assert outcome == Answer("Here.", "stop") and len(faults) == 2


def test_a_dead_endpoint():
    start_s = time.monotonic()
    outcome, faults = ask(endpoint(dead_url()))
    assert isinstance(outcome, AgentError) and "refused" in str(outcome) and len(faults) == 3
    assert time.monotonic() - start_s < 5.0


def test_a_host_that_nobody_knows():
    outcome, _ = ask(endpoint(f"http://{'x' * 80}.invalid/v1", retries=0))
    assert isinstance(outcome, AgentError) and "connection failed" in str(outcome)


def test_an_answer_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("moe_train.agents.endpoint.MOST_BYTES", 1000)
    with serving(sends(b" " * 5000)) as chat:
        outcome, _ = ask(endpoint(chat.base_url))
    assert "longer than 1000 bytes" in str(outcome)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_repeats_the_key_does_not_give_it_away(stream):
    with serving(refuses(401, f"wrong key {KEY} given")) as chat:
        outcome, faults = ask(endpoint(chat.base_url, stream=stream))
    assert "wrong key *** given" in str(outcome) and KEY not in f"{outcome}{faults}"
    assert outcome.__cause__ is None and outcome.__suppress_context__, "what is shown of it has no other error below"
    with serving(says(f"The key is {KEY}.")) as chat:
        outcome, _ = ask(endpoint(chat.base_url, stream=stream))
    assert outcome.text == "The key is ***."
    assert KEY not in repr(endpoint("http://x/v1"))


def test_address_and_key_of_the_mixture_are_those_of_its_agents(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    monkeypatch.setenv("OTHER_KEY", "other")
    own = OpenAIAgent(model="m", base_url="http://own/v1", key_env="OTHER_KEY")
    mixture = MixtureConfig(
        agents={"a": OpenAIAgent(model="m"), "b": own}, layers=(("a",),), aggregator="a", base_url="http://all/v1",
        key_env="SOME_KEY",
    )  # fmt: skip
    found = {name: endpoint_of(name, mixture.agents[name], mixture) for name in "ab"}
    assert [(found[name].base_url, found[name].key) for name in "ab"] == [
        ("http://all/v1", KEY),
        ("http://own/v1", "other"),
    ]
