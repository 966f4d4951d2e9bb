"""The transcript as a page that opens anywhere: one file, nothing from outside, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from moe_train.agents.transcript import Call, Transcript
from moe_train.observe import report
from moe_train.observe.files import write_atomically
from moe_train.observe.report.page import PAGE
from moe_train.observe.report.sections import section, table

FILE_NAME = "transcript.html"


def write_page(transcript: Transcript, folder: Path) -> Path:
    """Write ``transcript.html``, whole or not at all, and return its path.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / FILE_NAME
    write_atomically(path, render(transcript))
    return path


def render(transcript: Transcript) -> str:
    """Return the page as HTML."""
    style = resources.files(report).joinpath("page.css").read_text(encoding="utf-8")
    return PAGE.format(
        title=escape(f"{transcript.name}: mixture of agents"), style=style, body="\n".join(parts(transcript))
    )


def parts(transcript: Transcript) -> Iterator[str]:
    """Yield the parts of the page, from what matters most to what is looked up."""
    calls = len(transcript.calls)
    yield f"<h1>{escape(transcript.name)}</h1>\n<p>{escape(f'{transcript.started_utc} · {calls} calls')}</p>"
    yield section("Request", text_box(transcript.request))
    if transcript.answer is not None:
        yield section("Answer", text_box(transcript.answer))
    else:
        yield section("No answer", f"<p>{escape(transcript.error or 'The conversation has not ended.')}</p>")
    yield section("Events", events(transcript))
    for number, layer in enumerate(transcript.layers, 1):
        yield section(f"Layer {number}", "".join(map(call_box, layer)))
    rows = [(name, told(agent)) for name, agent in transcript.agents.items()]
    yield section("Agents", table(("name", "what it is"), rows))


def events(transcript: Transcript) -> str:
    """Return what the user was told."""
    if not transcript.events:
        return "<p>None: every agent answered at once.</p>"
    return f"<ul>{''.join(f'<li>{escape(event)}</li>' for event in transcript.events)}</ul>"


def call_box(call: Call) -> str:
    """Return a call: what was said, and folded away what was sent."""
    sent = "".join(f"<h3>{escape(message.role)}</h3>{text_box(message.content)}" for message in call.sent)
    said = f"<p>Left out: {escape(call.failure)}</p>" if call.answer is None and call.failure else ""
    said = text_box(call.answer.text) if call.answer is not None else said or "<p>Not ended.</p>"
    return f"<h3>{escape(call.agent)}</h3><p>{escape(facts(call))}</p>{said}{folded('What it was sent', sent)}"


def facts(call: Call) -> str:
    """Return time, attempts and end of a call, in words."""
    seconds = "" if call.seconds is None else f"{call.seconds:.1f} s"
    tries = f"{len(call.attempts)} attempts" if len(call.attempts) > 1 else ""
    ended = f"ended by {call.answer.finish}" if call.answer is not None and call.answer.finish else ""
    note = call.answer.note if call.answer is not None else ""
    return " · ".join(part for part in (seconds, tries, ended, note) if part)


def told(agent: dict[str, Any]) -> str:
    """Return what the configuration says of an agent, nested sections flattened."""
    flat = {
        (f"{key}.{inner}" if inner else key): leaf
        for key, value in agent.items()
        for inner, leaf in (value.items() if isinstance(value, dict) else [("", value)])
    }
    return ", ".join(f"{key}={value}" for key, value in flat.items() if value is not None)


def text_box(text: str) -> str:
    """Return a text as it stands, line by line."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, body: str) -> str:
    """Return ``body`` (HTML) under a title that opens it."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
