"""Who is asked, how often, and what each layer reads."""

import itertools
import threading
import time

import pytest
from agent_samples import Counter, Stub, mixture_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.agents.mixture import MixtureError, at_once
from moe_train.agents.prompts import Prompt, cut_note

NAMES = ["a", "b", "c"]
LAYERS = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(LAYERS, st.sampled_from(NAMES), st.lists(st.booleans(), min_size=3, max_size=3))
def test_calls_and_prompts_of_any_mixture(layers, aggregator, chats):
    """Calls are the sum of the agents; layer l reads all of layer l - 1, and the request."""
    agents = [Stub(name, is_chat) for name, is_chat in zip(NAMES, chats, strict=True)]
    mixture, _ = mixture_of(agents, layers, aggregator)
    answer = mixture.answer("the request")
    transcript = mixture.transcript
    asked = sum(len(agent.sent) for agent in agents)
    assert asked == len(transcript.calls) == sum(map(len, layers)) + 1
    assert sorted(seed for agent in agents for seed in agent.seeds) == list(range(asked)), "every call draws anew"
    assert [[call.agent for call in layer] for layer in transcript.layers] == [*layers, [aggregator]]
    for below, layer in itertools.pairwise(transcript.layers):
        for call in layer:
            sent = "\n".join(message.content for message in call.sent)
            assert "the request" in sent and "MERGE" in sent
            assert all(f"{number}. {other.answer.text}" in sent for number, other in enumerate(below, 1))
    for call in transcript.layers[0]:
        assert [message.content for message in call.sent] == ["the request"]
    assert answer == transcript.answer == transcript.layers[-1][0].answer.text and transcript.status == "done"


def test_what_a_chat_is_sent_and_what_a_text_model():
    prompt = Prompt("Why?", "Merge:", ["Because.", "Who knows?"])
    assert [(m.role, m.content) for m in prompt.as_chat()] == [
        ("system", "Merge:\n1. Because.\n2. Who knows?"), ("user", "Why?"),
    ]  # fmt: skip
    assert [(m.role, m.content) for m in prompt.as_text()] == [
        ("text", "Merge:\n1. Because.\n2. Who knows?\n\nWhy?"),
    ]
    assert [(m.role, m.content) for m in Prompt("Why?", "Merge:").as_text()] == [("text", "Why?")]


def test_the_note_on_a_prompt_that_is_too_long():
    assert cut_note(10, 8) == "the prompt has 10 tokens, the model reads the last 8"
    assert cut_note(8, 8) == cut_note(3, 8) == ""


def test_a_proposer_that_fails_is_left_out_and_told():
    agents = [Stub("good"), Stub("bad", fails=lambda number: number == 0), Stub("late")]
    mixture, told = mixture_of(agents, [["good", "bad", "late"], ["bad", "good"]], "good")
    mixture.answer("the request")
    (read,) = {call.sent[0].content for call in mixture.transcript.layers[1]}
    assert read == "MERGE\n1. <good says 0>\n2. <late says 2>", "what is left is numbered anew"
    assert told == mixture.transcript.events
    assert told == [
        "layer 1, bad: attempt 1 failed (out of order); tried again after 0.2 s",
        "layer 1, bad: left out after 2 attempts: still out of order",
    ]
    assert len(agents[1].sent) == 2, "in the next layer it has its chance"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_layer_without_any_answer_ends_the_conversation(failing):
    agents = [
        Stub("a", fails=lambda number: number == failing - 1),
        Stub("b", fails=lambda number: number == failing - 1),
    ]
    mixture, _ = mixture_of(agents, [["a", "b"], ["a", "b"]], "a")
    with pytest.raises(
        MixtureError, match=f"layer {failing}: none of 2 proposers answered .a: still out of order; b: "
    ):
        mixture.answer("the request")
    assert len(mixture.transcript.layers) == failing and len(mixture.transcript.calls) == 2 * failing


def test_an_aggregator_that_fails_ends_the_conversation():
    mixture, _ = mixture_of([Stub("a"), Stub("z", fails=lambda number: True)], [["a"]], "z")
    with pytest.raises(MixtureError, match=r"layer 2: the aggregator did not answer .z: still out of order"):
        mixture.answer("the request")
    assert mixture.transcript.answer is None


def test_a_note_is_told():
    mixture, told = mixture_of([Stub("a", note="half of it")], [["a"]], "a")
    mixture.answer("the request")
    assert told == ["layer 1, a: half of it", "layer 2, a: half of it"]


class Busy(Stub):
    """Counts how many of its kind work at the same time."""

    counter: Counter

    def ask(self, messages, seed, tell):
        with self.counter:
            return super().ask(messages, seed, tell)


def busy(count: int, is_local: bool) -> tuple[list[Busy], Counter]:
    agents = [Busy(f"agent{i}", is_local=is_local, pause_s=0.05) for i in range(count)]
    counter = Counter()
    for agent in agents:
        agent.counter = counter
    return agents, counter


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_proposers_of_a_layer_work_at_the_same_time(concurrency):
    agents, counter = busy(6, is_local=False)
    mixture, _ = mixture_of(agents, [[agent.name for agent in agents]], "agent0", concurrency)
    mixture.answer("the request")
    assert min(2, concurrency) <= counter.most <= concurrency


def test_local_models_work_one_at_a_time_and_keep_no_other_waiting():
    local, counter = busy(4, is_local=True)
    far, others = busy(1, is_local=False)
    far[0].name = "far"
    mixture, _ = mixture_of([*local, *far], [[*(agent.name for agent in local), "far"]], "far", concurrency=2)
    start_s = time.monotonic()
    mixture.answer("the request")
    assert counter.most == 1 and others.most == 1
    assert time.monotonic() - start_s < 3.0
    seconds = [call.seconds for call in mixture.transcript.layers[0]]
    assert max(seconds) < 0.05 * 4, "waiting for the turn does not count"


def test_an_error_of_ours_is_not_swallowed_and_threads_keep_no_process_alive():
    seen = []
    with pytest.raises(ZeroDivisionError):
        at_once([lambda: 1 / 0, lambda: seen.append(threading.current_thread().daemon)])
    assert seen == [True]
