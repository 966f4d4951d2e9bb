"""Let agents answer in layers, or score them: ``python -m moe_train.agents mixture=NAME prompt="..."``."""

from __future__ import annotations

from moe_train.config.process import settle

if __name__ == "__main__":
    settle("moe_train.agents.__main__")  # before anything slow is imported: it may start this process anew

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.agents import AgentsConfig, HuggingFaceAgent, OpenAIAgent, RunAgent
from moe_train.config.agents_rules import agents_problems
from moe_train.config.door import door
from moe_train.config.schema import LayoutConfig, SampleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from moe_train.agents.agent import Agent, Answer, Message
    from moe_train.data.loader import Batch
    from moe_train.dist.world import World
    from moe_train.inference.load import Trained

NO_ANSWER = 1
"""Exit status when the configuration is right, but all agents of a layer failed."""


@door("agents", AgentsConfig, agents_problems)
def main(config: AgentsConfig) -> None:
    """Print the answer of the mixture, or figures as one JSON object, and write them to the folder ``output``."""
    with world_of(config) as world:
        match config.mode:
            case "answer":
                answer(config, world)
            case "perplexity":
                publish(config, perplexity(config, needed(world)))
            case "vote":
                publish(config, vote(config, needed(world)))


@contextmanager
def world_of(config: AgentsConfig) -> Iterator[World | None]:
    """Make the world of one process in which runs are loaded; without any run, torch is not even imported."""
    if not any(isinstance(agent, RunAgent) for agent in config.mixture.agents.values()):
        yield None
        return
    from moe_train.dist.world import world_from_environment

    with world_from_environment(LayoutConfig().timeout_s) as world:
        yield world


def needed(world: World | None) -> World:
    """Return the world that an agent of kind run needs."""
    assert world is not None, "there is a world where there is a run"
    return world


def answer(config: AgentsConfig, world: World | None) -> None:
    """Print the answer; what happens meanwhile goes to the standard error."""
    from moe_train.agents.conversation import converse, each_made
    from moe_train.agents.mixture import MixtureError

    mixture = config.mixture
    named = dict.fromkeys([*(name for layer in mixture.layers for name in layer), mixture.aggregator])
    agents = each_made({name: partial(agent_of, name, config, world) for name in named})
    failure: MixtureError | None = None
    try:
        print(converse(config, agents, say).answer)  # noqa: T201
    except MixtureError as error:
        say(str(error))
        failure = error
    say(f"transcript: {Path(config.output).expanduser().resolve() / 'transcript.html'}")
    if failure is not None:
        sys.exit(NO_ANSWER)


def say(line: str) -> None:
    """Tell the user a line beside the answer."""
    sys.stderr.write(f"{line}\n")


def agent_of(name: str, config: AgentsConfig, world: World | None) -> Agent:
    """Return an agent that is ready to answer: a model in memory, or an address with its key."""
    agent = config.mixture.agents[name]
    match agent:
        case OpenAIAgent():
            from moe_train.agents.endpoint import endpoint_of

            return endpoint_of(name, agent, config.mixture)
        case HuggingFaceAgent():
            from moe_train.agents.huggingface import load_folder
            from moe_train.dist.world import pick_device

            return load_folder(name, agent, pick_device(0))
        case RunAgent():
            return run_agent(name, agent, needed(world))


def run_agent(name: str, agent: RunAgent, world: World) -> Agent:
    """Return a run as an agent that continues text."""
    from moe_train.agents.heldout import require_task
    from moe_train.agents.local import LocalAgent

    trained = loaded(agent, world)
    require_task({name: trained.config.task.kind}, "language", "answer")
    return LocalAgent(
        name, False, agent.timeout_s, trained.model, partial(continued, trained, agent.sample, agent.inference.remember)
    )


def continued(trained: Trained, sample: SampleConfig, remember: bool, sent: Sequence[Message], seed: int) -> Answer:
    """Return a run's continuation of a text."""
    from moe_train.agents.agent import Answer, require_text
    from moe_train.agents.prompts import cut_note
    from moe_train.inference.sampler import generate

    tokenizer, context = trained.tokenizer, trained.config.data.seq_len
    prompt = tokenizer.encode(sent[0].content) or [tokenizer.boundary_id]
    drawn = sample.model_copy(update={"seed": sample.seed + seed})
    tokens = generate(trained.model, prompt, drawn, tokenizer.boundary_id, context, remember)
    finish = "length" if len(tokens) == sample.max_tokens else "stop"
    return Answer(require_text(tokenizer.decode(tokens)), finish, cut_note(len(prompt), context))


def loaded(agent: RunAgent, world: World) -> Trained:
    """Return the model of a run."""
    from moe_train.inference.load import load_trained

    return load_trained(Path(agent.dir).expanduser(), agent.checkpoint, LayoutConfig(), world, agent.inference)


def all_loaded(config: AgentsConfig, world: World) -> dict[str, Trained]:
    """Return the models of all agents, by name; the rules of the configuration say that all are runs."""
    from moe_train.agents.conversation import each_made

    runs = {name: agent for name, agent in config.mixture.agents.items() if isinstance(agent, RunAgent)}
    return each_made({name: partial(loaded, agent, world) for name, agent in runs.items()})


def publish(config: AgentsConfig, figures: Mapping[str, Any]) -> None:
    """Print figures and write them to ``score.json``."""
    from moe_train.observe.files import write_atomically

    text = json.dumps({"mode": config.mode, **figures}, indent=1)
    write_atomically(Path(config.output).expanduser() / "score.json", f"{text}\n")
    print(text)  # noqa: T201


def perplexity(config: AgentsConfig, world: World) -> dict[str, Any]:
    """Return the held-out figures of language models and of their mixtures."""
    from moe_train.agents.heldout import Reader, common, common_length, require_task
    from moe_train.agents.perplexity import mixture_scores, score_tokens
    from moe_train.data.corpus import open_corpus
    from moe_train.data.loader import heldout_batches

    trained = all_loaded(config, world)
    require_task({name: run.config.task.kind for name, run in trained.items()}, "language", config.mode)
    common({name: run.tokenizer.fingerprint for name, run in trained.items()}, "dir", "tokenizer")
    corpora = {
        name: open_corpus(run.config.data, run.config.tokenizer, world.leader_first) for name, run in trained.items()
    }
    chosen = config.score.heldout_of or common({n: c.fingerprint for n, c in corpora.items()}, "dir", "corpus")
    store = corpora[chosen].heldout
    readers = {n: Reader(run.config.data.seq_len, run.model.config.max_positions) for n, run in trained.items()}
    seq_len = common_length(readers, config.score.seq_len)
    batches = heldout_batches(store, seq_len, config.score.rows, 0, 1, config.score.batches)
    scores = [partial(logits_of, run) for run in trained.values()]
    tokens = score_tokens(scores, batches, trained[chosen].tokenizer.vocab_size)
    return mixture_scores(list(trained), tokens, config.score.fit_fraction).figures(store.num_tokens, store.num_bytes)


def logits_of(trained: Trained, batch: Batch) -> Tensor:
    """Return the scores of the next token, [B, S, V], as held-out evaluation computes them."""
    import torch

    from moe_train.training.step import to_inputs

    with torch.no_grad():
        inputs = to_inputs(batch, trained.model, trained.mesh, seed=0)  # nothing is drawn in evaluation
        logits_BSV: Tensor = trained.model(inputs.tokens_BS, inputs.context).logits_BSV
        return logits_BSV


def vote(config: AgentsConfig, world: World) -> dict[str, Any]:
    """Return the accuracy of classifiers on held-out texts, each by itself and by vote."""
    import torch

    from moe_train.agents.heldout import common, digest, require_task
    from moe_train.agents.vote import vote_scores
    from moe_train.inference.classify import class_probabilities, classes_of, heldout_texts

    trained = all_loaded(config, world)
    require_task({name: run.config.task.kind for name, run in trained.items()}, "sentiment", config.mode)
    common({name: ", ".join(classes_of(run)) for name, run in trained.items()}, "dir", "classes")
    held = {name: heldout_texts(run, world) for name, run in trained.items()}
    chosen = config.score.heldout_of or common({n: digest(*h) for n, h in held.items()}, "dir", "held-out texts")
    texts, labels_N = held[chosen]
    tables = {name: class_probabilities(run, texts) for name, run in trained.items()}
    return asdict(vote_scores(list(tables), torch.stack(list(tables.values())), labels_N))


if __name__ == "__main__":
    main()
