"""The keys of a mixture of agents: who they are, who reads whom, how they are called, and how they are scored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe_train.config.base import Fraction, Strict
from moe_train.config.inference import InferenceConfig
from moe_train.config.schema import SampleConfig

SYNTHESIS = """\
Several models have each answered the request that follows; their answers are listed below. Write one answer to that \
request which draws the best of them together. Judge what you read: parts of it may be biased or wrong. Do not just \
repeat one of them; correct, complete and order what they say, so that your answer is accurate, comprehensive, \
coherent and as reliable as you can make it.

Answers of the models:"""
"""The aggregate-and-synthesise prompt: what table 1 of arXiv 2406.04692 asks for, in other words."""
SECRET = re.compile(r".*(?:key|token|secret|passw).*", re.IGNORECASE)


class AgentBase(Strict):
    """What every agent has."""

    timeout_s: PositiveFloat = 120.0
    """Longest time of one attempt to get an answer, from its start to the last word, in seconds. Local models are run
    one at a time; waiting for the turn does not count."""


class RunAgent(AgentBase):
    """A run of this project: it continues the text of the prompt."""

    kind: Literal["run"] = "run"
    """What the agent is."""
    dir: str
    """Run folder."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint."""
    sample: SampleConfig = SampleConfig()
    """How text is drawn; the number of the call is added to the seed."""
    inference: InferenceConfig = InferenceConfig()
    """How the model is run."""


class HuggingFaceAgent(AgentBase):
    """A Hugging Face folder, run by transformers; its chat template is used where it has one."""

    kind: Literal["huggingface"] = "huggingface"
    """What the agent is."""
    path: str
    """Folder with config.json, weights and tokenizer; nothing is downloaded."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of weights and activations; auto: what the folder says."""
    sample: SampleConfig = SampleConfig()
    """How text is drawn; the number of the call is added to the seed."""


class OpenAIAgent(AgentBase):
    """A model behind an HTTP endpoint that speaks the protocol of OpenAI's chat completions."""

    kind: Literal["openai"] = "openai"
    """What the agent is."""
    model: str
    """Name of the model, as the endpoint knows it."""
    base_url: str | None = None
    """Address up to and without /chat/completions; null: mixture.base_url."""
    key_env: str | None = None
    """Name of the environment variable that holds the key, in capitals; null: mixture.key_env. The key itself has no
    place in the configuration."""
    temperature: NonNegativeFloat | None = 0.7
    """Temperature of the draw; null: the endpoint's own."""
    max_tokens: PositiveInt | None = 2048
    """Longest answer, in tokens; null: the endpoint's own limit."""
    stream: bool = False
    """Whether the answer is sent in pieces, while it is written (server-sent events)."""
    retries: NonNegativeInt = 3
    """Further attempts after a time-out, a broken connection, status 429 or 5xx; other faults are final."""
    backoff_s: PositiveFloat = 1.0
    """Wait before the second attempt, in seconds: doubled for each further one up to 30 s, and shortened by chance to
    between half and all of it. Where the endpoint says how long to wait (Retry-After), that is the least."""
    total_s: PositiveFloat = 600.0
    """Longest time of a call with all attempts and waits, in seconds."""

    @model_validator(mode="before")
    @classmethod
    def mask_secrets(cls, values: Any) -> Any:
        """Mask the value of a key that looks like a secret: it will be refused, and must not be shown."""
        if not isinstance(values, dict):
            return values
        known = cls.model_fields
        return {name: "***" if name not in known and SECRET.match(str(name)) else v for name, v in values.items()}


Agent: TypeAlias = Annotated[RunAgent | HuggingFaceAgent | OpenAIAgent, Field(discriminator="kind")]
Names: TypeAlias = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class MixtureConfig(Strict):
    """Agents, and the layers in which they read each other (arXiv 2406.04692, section 2.2)."""

    agents: dict[str, Agent]
    """The agents by name."""
    layers: Annotated[tuple[Names, ...], Field(strict=False, min_length=1)]
    """Names of the proposers of each layer but the last: three layers, as the paper counts, are two here. An agent may
    stand twice in a layer; its answers then differ by the draw."""
    aggregator: str
    """Name of the agent of the last layer, whose answer is that of the mixture."""
    synthesis: str = SYNTHESIS
    """What agents from the second layer on are told before they get the numbered answers of the layer below."""
    base_url: str | None = None
    """Address of the agents of kind openai that have none of their own."""
    key_env: str | None = None
    """Name of the environment variable with their key; null: no key is sent."""


class ScoreConfig(Strict):
    """How a mixture of this project's own runs is scored on held-out text."""

    batches: PositiveInt | None = None
    """perplexity: forward passes; null: the whole split."""
    rows: PositiveInt = 8
    """Sequences, or texts, per forward pass."""
    seq_len: PositiveInt | None = None
    """perplexity: positions per sequence; null: the shortest data.seq_len of the runs."""
    heldout_of: str | None = None
    """perplexity: name of the agent whose held-out text is used; null: all must have the same. Another agent may have
    been trained on it."""
    fit_fraction: Fraction = 0.25
    """perplexity: share of the held-out tokens, from its beginning, on which weights of the proposers are fitted. Every
    figure is of the other tokens. 0: nothing is fitted."""


class AgentsConfig(Strict):
    """Configuration of ``moe_train.agents``."""

    name: str = "default"
    """Name of the conversation; the last part of its folder."""
    output: str = "runs/agents/${name}"
    """Folder for transcript.json and transcript.html, or score.json."""
    mode: Literal["answer", "perplexity", "vote"] = "answer"
    """answer: the mixture answers the prompt; perplexity: language models are scored on held-out text, each by itself
    and mixed; vote: classifiers, each by itself and by majority."""
    prompt: str | None = None
    """answer: the request."""
    prompt_file: str | None = None
    """answer: path of a UTF-8 text file with the request, instead of prompt."""
    mixture: MixtureConfig
    """The agents and their layers."""
    concurrency: PositiveInt = 8
    """Calls of a layer that run at the same time; of local models there is one at a time."""
    score: ScoreConfig = ScoreConfig()
    """Scoring on held-out text."""
