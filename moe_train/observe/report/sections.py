"""The parts of the page, each from the run to HTML; every text of the run is escaped here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from moe_train.observe.classes import collapses
from moe_train.observe.redact import redact
from moe_train.observe.report.drawing import STYLE, embed
from moe_train.observe.report.figures import FigureModule, figures_of
from moe_train.observe.report.record import RunRecord
from moe_train.observe.report.reproduce import launch_command
from moe_train.observe.report.summary import tiles

LOGGER = logging.getLogger(__name__)

# Bounds that keep the page small and readable; what is left out is said on the page.
MOST_EVENTS = 200
MOST_SAMPLES = 5
MOST_CHARACTERS = 20_000


def header(run: RunRecord) -> str:
    """Return name and origin of the run."""
    git = run.environment.get("git")
    commit = f"commit {str(git.get('commit'))[:12]}" if isinstance(git, Mapping) else ""
    if commit and isinstance(git, Mapping) and git.get("dirty"):
        commit += " with local changes"
    origin = [run.environment.get("started_utc"), run.environment.get("host"), commit]
    return f"<h1>{escape(run.name)}</h1>\n<p>{escape(' · '.join(str(part) for part in origin if part))}</p>"


def summary(run: RunRecord) -> str:
    """Return the card with the run's main figures, and what is wrong with the record."""
    notes = []
    if not run.train and not run.evals:
        notes.append("The run has no train or eval record yet.")
    elif not run.evals:
        notes.append("The run has no evaluation yet.")
    if run.unreadable_lines:
        notes.append(f"{run.unreadable_lines} line(s) of metrics.jsonl could not be read and are left out.")
    notes += collapses(run.evals[-1]) if run.evals else []
    cards = "".join(
        f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}</dd><small>{escape(tile.note)}</small></div>"
        for tile in tiles(run)
    )
    return (f'<dl class="card">{cards}</dl>' if cards else "") + "".join(f"<p>{escape(note)}</p>" for note in notes)


def figures(run: RunRecord) -> str:
    """Return every figure of the run's kind of layers, or the sentence that says why it is not there."""
    return "".join(figure(module, run) for module in figures_of(run))


def figure(module: FigureModule, run: RunRecord) -> str:
    """Return one figure with title and caption."""
    import matplotlib

    title = escape(module.TITLE)
    try:
        with matplotlib.rc_context(STYLE):
            drawn = module.draw(run)
            body = "" if drawn is None else embed(drawn, title)
    except Exception as error:  # one odd record must not cost the reader the rest of the page
        LOGGER.warning("figure %s could not be drawn: %s", module.TITLE, error)
        return section(module.TITLE, f"<p>Could not be drawn: {escape(f'{type(error).__name__}: {error}')}</p>")
    if not body:
        return section(module.TITLE, f"<p>{escape(module.ABSENT)}</p>")
    return section(module.TITLE, f"<figure>{body}<figcaption>{escape(module.CAPTION)}</figcaption></figure>")


def samples(run: RunRecord) -> str:
    """Return the newest texts that the model wrote."""
    if not run.samples:
        return ""
    shown = run.samples[-MOST_SAMPLES:]
    texts = "".join(f"<h3>{escape(sample.name)}</h3><pre>{escape(cut(sample.text))}</pre>" for sample in shown)
    return section("Text samples", texts)


def events(run: RunRecord) -> str:
    """Return what happened beside training: resumes, saves, incidents."""
    if not run.events:
        return section("Events", "<p>None were recorded.</p>")
    hidden = len(run.events) - MOST_EVENTS
    rows = [(event["step"], event.get("event", ""), details(event)) for event in run.events[-MOST_EVENTS:]]
    note = f"<p>The first {hidden} are left out.</p>" if hidden > 0 else ""
    return section("Events", note + table(("step", "event", "details"), rows))


def details(event: Mapping[str, Any]) -> str:
    """Return an event's message and whatever else it carries."""
    known = ("kind", "step", "event", "message")
    # What is told of each layer is for figures: of a large model it would be most of the page.
    others = {key: value for key, value in event.items() if key not in known and not isinstance(value, Mapping)}
    pairs = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in others.items()]
    return redact(" ".join([str(event.get("message", "")), *pairs]).strip())


def reproduction(run: RunRecord) -> str:
    """Return the command that starts the run again."""
    command = launch_command(run.environment)
    body = f"<pre>{escape(redact(command))}</pre>" if command else "<p>The command was not recorded.</p>"
    return section("How to reproduce", body)


def configuration(run: RunRecord) -> str:
    """Return the resolved configuration as it stands in the run folder."""
    body = f"<pre>{escape(cut(redact(run.config_text)))}</pre>" if run.config_text else "<p>No config.yaml.</p>"
    return section("Configuration", body)


def surroundings(run: RunRecord) -> str:
    """Return the environment as a table of dotted names."""
    rows = [(key, cut(redact(value))) for key, value in flattened(run.environment)]
    return section("Environment", table(("what", "value"), rows) if rows else "<p>No environment.json.</p>")


def section(title: str, body: str) -> str:
    """Return ``body`` (HTML) under a heading (text)."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table of texts."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested mappings as pairs of dotted name and text."""
    leaves: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            leaves += flattened(value, f"{prefix}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            leaves.append((f"{prefix}{key}", text))
    return leaves


def cut(text: str) -> str:
    """Return the first MOST_CHARACTERS of ``text``, and how many follow."""
    hidden = len(text) - MOST_CHARACTERS
    return text if hidden <= 0 else f"{text[:MOST_CHARACTERS]}\n[{hidden} more characters]"
