"""One request answered by a mixture, with its transcript on disk whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from moe_train.agents.agent import Agent
from moe_train.agents.mixture import Mixture
from moe_train.agents.page import write_page
from moe_train.agents.transcript import Transcript
from moe_train.config.agents import AgentsConfig
from moe_train.errors import DataError, Problem, UserError
from moe_train.observe.redact import redact

Made = TypeVar("Made")


def each_made(makers: Mapping[str, Callable[[], Made]]) -> dict[str, Made]:
    """Make everything, by name.

    Raises:
        UserError: of the kind of the first that cannot be made, with the problems of all.
    """
    made: dict[str, Made] = {}
    errors: list[UserError] = []
    for name, make in makers.items():
        try:
            made[name] = make()
        except UserError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])([problem for error in errors for problem in error.problems])
    return made


def converse(config: AgentsConfig, agents: Mapping[str, Agent], tell: Callable[[str], None]) -> Transcript:
    """Let a mixture answer the request of a configuration, and write ``transcript.json`` and ``transcript.html``.

    Args:
        config: mode ``answer``.
        agents: by name; those of the layers and the aggregator.
        tell: shows the user a line.

    Raises:
        DataError: the file of the request cannot be read.
        MixtureError: a layer has no answer; the transcript up to there is written.
    """
    request, folder = request_of(config), Path(config.output).expanduser()
    started_utc = datetime.now(UTC).isoformat(timespec="seconds")
    transcript = Transcript.begin(config, request, started_utc)
    with recorded(transcript, folder):
        mixture = Mixture(
            config.mixture, agents, config.concurrency, transcript, tell, lambda: transcript.write(folder)
        )
        mixture.answer(request)
    return transcript


@contextlib.contextmanager
def recorded(transcript: Transcript, folder: Path) -> Iterator[None]:
    """Write a transcript when the conversation ends, also when it fails or is interrupted."""
    try:
        yield
    except BaseException as error:
        transcript.status, transcript.error = "failed", redact(str(error) or type(error).__name__)
        raise
    finally:
        transcript.write(folder)
        write_page(transcript, folder)


def request_of(config: AgentsConfig) -> str:
    """Return the request, from the configuration or its file.

    Raises:
        DataError: the file cannot be read, or says nothing.
    """
    if config.prompt_file is None:
        assert config.prompt is not None, "the rules of the configuration require a prompt"
        return config.prompt
    try:
        text = Path(config.prompt_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem("prompt_file", config.prompt_file, str(error), "give a UTF-8 text file")) from error
    if not text:
        raise DataError(Problem("prompt_file", config.prompt_file, "is empty", "write the request into it"))
    return text
