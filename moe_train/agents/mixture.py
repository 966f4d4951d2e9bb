"""The mixture itself: layers of proposers that read the layer below, and an aggregator (arXiv 2406.04692, eq. 1)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from moe_train.agents.agent import Agent, AgentError
from moe_train.agents.prompts import Prompt
from moe_train.agents.transcript import Call, Transcript
from moe_train.config.agents import MixtureConfig


class MixtureError(Exception):
    """No agent of a layer answered: there is nothing that the next could read."""


@dataclass(frozen=True)
class Mixture:
    """Agents at work on one request.

    Attributes:
        config: who reads whom.
        agents: by name; every name of the configuration's layers is there.
        concurrency: most calls at one time.
        transcript: of the conversation; grows while it goes on.
        tell: shows the user a line.
        save: called after every layer.
    """

    config: MixtureConfig
    agents: Mapping[str, Agent]
    concurrency: int
    transcript: Transcript
    tell: Callable[[str], None]
    save: Callable[[], object]
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held by the local model that computes: two at a time would share cores and memory."""

    def answer(self, request: str) -> str:
        """Return the mixture's answer.

        Layer l gets the request and, from the second on, what all agents of layer l - 1 said (eq. 1:
        ``y_l = Concat_j A_lj(x_l) + x_1``, ``x_(l+1) = y_l``); the last layer is the aggregator.

        Raises:
            MixtureError: no agent of a layer answered.
        """
        answers: list[str] = []
        for names in (*self.config.layers, (self.config.aggregator,)):
            answers = self.layer(names, Prompt(request, self.config.synthesis, answers))
        self.transcript.answer, self.transcript.status = answers[0], "done"
        return answers[0]

    def layer(self, names: Sequence[str], prompt: Prompt) -> list[str]:
        """Return what the agents of a layer answer, in their order; those that fail are left out, which is told.

        Raises:
            MixtureError: all failed.
        """
        first, layers = len(self.transcript.calls), self.transcript.layers
        agents = [self.agents[name] for name in names]
        calls = [Call(agent.name, prompt.as_chat() if agent.is_chat else prompt.as_text()) for agent in agents]
        layers.append(calls)
        permits = threading.BoundedSemaphore(self.concurrency)
        pairs = enumerate(zip(agents, calls, strict=True), first)
        at_once([partial(self.call, agent, call, seed, permits) for seed, (agent, call) in pairs])
        for call in calls:
            self.report(len(layers), call)
        self.save()
        answers = [call.answer.text for call in calls if call.answer is not None]
        if not answers:
            is_last = len(layers) > len(self.config.layers)
            who = "the aggregator did not answer" if is_last else f"none of {len(calls)} proposers answered"
            reasons = "; ".join(dict.fromkeys(f"{call.agent}: {call.failure}" for call in calls))
            raise MixtureError(f"layer {len(layers)}: {who} ({reasons})")
        return answers

    def call(self, agent: Agent, call: Call, seed: int, permits: threading.BoundedSemaphore) -> None:
        """Ask one agent, when it is its turn, and record what comes of it."""
        with ExitStack() as held:
            if agent.is_local:  # first the turn: who waits for it must not keep a permit from those that could go on
                held.enter_context(self._turn)
            held.enter_context(permits)
            start_s = time.monotonic()
            try:
                call.answer = agent.ask(call.sent, seed, call.attempts.append)
            except AgentError as error:
                call.failure = str(error)
            call.seconds = time.monotonic() - start_s

    def report(self, layer: int, call: Call) -> None:
        """Tell the user, and the transcript, what he should know of a call."""
        where = f"layer {layer}, {call.agent}"
        for number, attempt in enumerate(call.attempts[:-1], 1):
            self.say(f"{where}: attempt {number} failed ({attempt.fault}); tried again after {attempt.wait_s:.1f} s")
        if call.failure is not None:
            tries = len(call.attempts)
            self.say(f"{where}: left out after {tries} attempt{'s' if tries != 1 else ''}: {call.failure}")
        elif call.answer is not None and call.answer.note:
            self.say(f"{where}: {call.answer.note}")

    def say(self, line: str) -> None:
        """Tell the user and the transcript."""
        self.transcript.events.append(line)
        self.tell(line)


def at_once(works: Sequence[Callable[[], None]]) -> None:
    """Run all at the same time and wait for all; raise the first error of any.

    The threads do not keep the process alive: who interrupts it does not wait for agents that are silent.
    """
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
