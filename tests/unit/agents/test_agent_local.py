"""Models in this process: in time, or left out."""

import time

import pytest
from torch import nn, zeros

from moe_train.agents.agent import AgentError, Answer, Message, require_text
from moe_train.agents.local import LocalAgent, expiring

ASKED = [Message("text", "Once")]


def agent_that(complete, model=None, timeout_s=5.0):
    return LocalAgent("local", False, timeout_s, model or nn.Identity(), complete)


def test_an_answer_and_its_attempt():
    told, asked = [], []

    def complete(sent, seed):
        asked.append((sent, seed))
        return Answer("upon a time")

    assert agent_that(complete).ask(ASKED, 7, told.append) == Answer("upon a time")
    assert asked == [(ASKED, 7)] and [attempt.fault for attempt in told] == [None]


def test_a_model_that_is_late_is_stopped_between_two_tokens():
    model, told, passes = nn.Identity(), [], []

    def complete(sent, seed):
        for _ in range(1000):
            model(zeros(1))
            passes.append(time.sleep(0.02))
        return Answer("never")

    with pytest.raises(AgentError, match=r"no answer in 0.1 s"):
        agent_that(complete, model, timeout_s=0.1).ask(ASKED, 0, told.append)
    assert 1 <= len(passes) < 100 and told[0].fault == "no answer in 0.1 s"
    assert not model._forward_pre_hooks, "the next call has its own time"


def test_a_hook_is_gone_whatever_happens():
    model = nn.Identity()
    with pytest.raises(ZeroDivisionError), expiring(model, 1.0):
        model(zeros(1))
        raise ZeroDivisionError
    assert not model._forward_pre_hooks


def test_a_model_that_fails_is_an_agent_that_fails():
    told = []
    with pytest.raises(AgentError, match="ZeroDivisionError: division by zero") as caught:
        agent_that(lambda sent, seed: Answer(str(1 / 0))).ask(ASKED, 0, told.append)
    assert len(told) == 1 and not caught.value.is_passing


def test_an_empty_answer_is_none():
    assert require_text(" a \n") == "a"
    with pytest.raises(AgentError, match="empty"):
        require_text(" \n")
