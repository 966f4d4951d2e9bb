"""The page itself: one file, nothing from outside, for screen and paper, light and dark."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path

from moe_train.observe.files import write_atomically
from moe_train.observe.report import sections
from moe_train.observe.report.record import RunRecord

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

PARTS = (
    sections.header,
    sections.summary,
    sections.figures,
    sections.samples,
    sections.events,
    sections.reproduction,
    sections.configuration,
    sections.surroundings,
)


def write_report(run_dir: Path) -> Path:
    """Draw the run in ``run_dir``, finished or running, and return the path of the page: ``report/index.html``.

    Raises:
        OSError: the page cannot be written; one from before stays whole.
    """
    path = run_dir / "report" / "index.html"
    write_atomically(path, render(RunRecord.load(run_dir)))
    return path


def render(run: RunRecord) -> str:
    """Return the page of ``run`` as HTML."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part(run) for part in PARTS)
    return PAGE.format(title=escape(f"{run.name}: training report"), style=style, body=body)
