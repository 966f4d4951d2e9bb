"""The transcript on disk: complete, without keys, and a page that no text can break out of."""

import json
from html.parser import HTMLParser

import pytest
from agent_samples import Stub
from chat_server import refuses, says, serving

from moe_train.agents.agent import Answer, Attempt
from moe_train.agents.conversation import converse, each_made
from moe_train.agents.endpoint import endpoint_of
from moe_train.agents.mixture import MixtureError
from moe_train.agents.page import render
from moe_train.agents.transcript import VERSION, Transcript
from moe_train.config.agents import AgentsConfig
from moe_train.errors import ConfigError, DataError, Problem

KEY = "kq-93-not-to-be-seen"
VOID = {"meta"}


class Reader(HTMLParser):
    """The texts and tags of a page; every tag must be closed in its turn."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def config_of(tmp_path, agents, layers, aggregator, **more):
    mixture = {"agents": agents, "layers": layers, "aggregator": aggregator, "synthesis": "MERGE"}
    return AgentsConfig.model_validate(
        {"name": "talk", "output": str(tmp_path / "out"), "prompt": "Why <b>?", "mixture": mixture} | more
    )


def stubs_of(*stubs):
    return {stub.name: stub for stub in stubs}


def openai(**more):
    return {"kind": "openai", "model": "m", "backoff_s": 0.01, **more}


def test_what_the_file_holds(tmp_path):
    config = config_of(tmp_path, {"a": openai(), "b": openai()}, [["a", "b"]], "b")
    agents = stubs_of(Stub("a", fails=lambda number: True), Stub("b"))
    told = []
    converse(config, agents, told.append)
    found = json.loads((tmp_path / "out" / "transcript.json").read_text())
    assert (found["version"], found["calls"], found["attempts"]) == (VERSION, 3, 4)
    assert (found["name"], found["request"], found["status"]) == ("talk", "Why <b>?", "done")
    assert found["answer"] == "<b says 2>" and found["error"] is None and found["events"] == told != []
    assert found["agents"]["a"]["model"] == "m"
    (bad, good), (last,) = found["layers"]
    assert bad["failure"] == "still out of order" and bad["answer"] is None
    assert [attempt["fault"] for attempt in bad["attempts"]] == ["out of order", "still out of order"]
    assert good["answer"] == {"text": "<b says 1>", "finish": "stop", "note": ""} and good["seconds"] >= 0
    assert last["sent"] == [
        {"role": "system", "content": "MERGE\n1. <b says 1>"}, {"role": "user", "content": "Why <b>?"},
    ]  # fmt: skip


def test_a_conversation_that_fails_is_written_up_to_there(tmp_path):
    config = config_of(tmp_path, {"a": openai(), "b": openai()}, [["a"], ["b"], ["a"]], "b")
    with pytest.raises(MixtureError):
        converse(config, stubs_of(Stub("a"), Stub("b", fails=lambda number: True)), lambda line: None)
    found = json.loads((tmp_path / "out" / "transcript.json").read_text())
    assert found["status"] == "failed" and found["error"].startswith("layer 2: ") and found["answer"] is None
    assert [[call["agent"] for call in layer] for layer in found["layers"]] == [["a"], ["b"]]
    page = (tmp_path / "out" / "transcript.html").read_text()
    assert "No answer" in page and "layer 2: none of 1 proposers answered" in page


def test_an_interrupted_conversation_is_written_too(tmp_path):
    class Interrupted(Stub):
        def ask(self, messages, seed, tell):
            raise KeyboardInterrupt

    config = config_of(tmp_path, {"a": openai()}, [["a"]], "a")
    with pytest.raises(KeyboardInterrupt):
        converse(config, stubs_of(Interrupted("a")), lambda line: None)
    found = json.loads((tmp_path / "out" / "transcript.json").read_text())
    assert (found["status"], found["error"]) == ("failed", "KeyboardInterrupt")


def test_a_layer_is_on_disk_before_the_next_begins(tmp_path):
    class Reading(Stub):
        def ask(self, messages, seed, tell):
            found = json.loads((tmp_path / "out" / "transcript.json").read_text())
            assert found["status"] == "running" and len(found["layers"]) == 1
            return super().ask(messages, seed, tell)

    config = config_of(tmp_path, {"a": openai(), "z": openai()}, [["a"]], "z")
    assert converse(config, stubs_of(Stub("a"), Reading("z")), lambda line: None).answer == "<z says 1>"


def test_keys_are_nowhere(tmp_path, monkeypatch):
    """Not where the server repeats them, in an answer or in a refusal, and not where the configuration might."""
    monkeypatch.setenv("SOME_KEY", KEY)
    told = []
    with serving(says(f"you sent {KEY}")) as good, serving(refuses(500, f"bad {KEY}")) as bad:
        agents = {
            "good": openai(base_url=good.base_url, key_env="SOME_KEY"),
            "bad": openai(base_url=bad.base_url, key_env="SOME_KEY", retries=1),
        }
        config = config_of(tmp_path, agents, [["good", "bad"]], "good")
        made = {name: endpoint_of(name, agent, config.mixture) for name, agent in config.mixture.agents.items()}
        converse(config, made, told.append)
    assert {request.headers["Authorization"] for request in [*good.requests, *bad.requests]} == {f"Bearer {KEY}"}
    assert "you sent ***" in good.requests[1].contents()[0], "nor is it sent on to the next layer"
    for text in ["\n".join(told), *(path.read_text() for path in (tmp_path / "out").iterdir())]:
        assert KEY not in text and "bad ***" in text


def test_the_page_escapes_every_text():
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> & \"'"
    transcript = Transcript(evil, evil, evil, {evil: {"kind": evil, "sample": {evil: evil}}})
    agents = [Stub(evil, is_chat=is_chat) for is_chat in (True, False)]
    from moe_train.agents.transcript import Call

    calls = [Call(evil, (message,)) for message in (agents[0].sent and agents[0].sent[0]) or ()]
    calls += [Call(evil, (), [Attempt(1.0, evil)], Answer(evil, evil, evil), None, 1.0), Call(evil, (), failure=evil)]
    transcript.layers.append(calls)
    transcript.events.append(evil)
    transcript.error = evil
    for answer in (None, evil):
        transcript.answer = answer
        page = Reader(render(transcript))
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "img"} and not any("onerror" in attributes for _, attributes in page.tags)
        assert sum(evil in text for text in page.texts) >= 8


def test_the_page_needs_nothing_else(tmp_path):
    config = config_of(tmp_path, {"a": openai(), "b": openai()}, [["a", "b"]], "a")
    converse(config, stubs_of(Stub("a"), Stub("b")), lambda line: None)
    page = Reader((tmp_path / "out" / "transcript.html").read_text())
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert {"html", "head", "style", "body", "h1", "details"} <= {tag for tag, _ in page.tags}
    text = "".join(page.texts)
    assert text.index("Request") < text.index("Answer") < text.index("Layer 1") < text.index("Layer 2")
    assert text.count("<a says 0>") == 2, "as an answer, and in what the aggregator was sent"


def test_a_request_from_a_file(tmp_path):
    path = tmp_path / "request.txt"
    config = config_of(tmp_path, {"a": openai()}, [["a"]], "a", prompt=None, prompt_file=str(path))
    path.write_text("Quoted, 'so'? = {x}\n", encoding="utf-8")
    stub = Stub("a")
    converse(config, stubs_of(stub), lambda line: None)
    assert stub.sent[0][0].content == "Quoted, 'so'? = {x}"
    for content, told in [(b"\xff\xfe", "utf-8"), (b" \n", "is empty")]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=told):
            converse(config, stubs_of(stub), lambda line: None)


def test_all_agents_that_cannot_be_made_are_told_together():
    def fail(key):
        raise DataError([Problem(key, None, "is broken", "mend it")])

    with pytest.raises(DataError) as caught:
        each_made({"a": lambda: fail("first"), "b": lambda: 1, "c": lambda: fail("second")})
    assert [problem.key for problem in caught.value.problems] == ["first", "second"]
    assert each_made({"b": lambda: 1}) == {"b": 1}
    assert not isinstance(caught.value, ConfigError)
