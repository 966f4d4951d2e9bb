"""Tokenise a corpus ahead of training: ``python -m moe_train.prepare KEY=VALUE ...``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_train.config.door import door
from moe_train.config.label_rules import label_problems
from moe_train.config.rules import data_problems
from moe_train.config.schema import PrepareConfig
from moe_train.config.task import LanguageTask
from moe_train.data.manifest import PreparedCorpus
from moe_train.data.pack import prepare
from moe_train.data.progress import console_progress
from moe_train.errors import Problem


def rules(config: PrepareConfig) -> list[Problem]:
    """Return what is wrong between the fields of the configuration; labelled texts are prepared by their training."""
    return [*data_problems(config.data, config.tokenizer), *label_problems(config.data, LanguageTask())]


@door("prepare", PrepareConfig, rules)
def main(config: PrepareConfig) -> None:
    """Write the token files, or find them finished, and show what they hold."""
    output = None if config.output is None else Path(config.output).expanduser()
    corpus = prepare(config.data, config.tokenizer, output, console_progress)
    console = Console()
    console.print(summary(corpus))
    # On a line of its own, so that a long path is not cut by the table.
    console.print(f"folder: {corpus.folder}", soft_wrap=True, highlight=False)


def summary(corpus: PreparedCorpus) -> Table:
    """Return a table with a row per split."""
    table = Table(
        "split", "documents", "MB", "tokens", "bytes per token", title="prepared corpus", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for split, size in corpus.manifest.splits.items():
        ratio = f"{size.bytes / size.tokens:.2f}" if size.tokens else "-"
        table.add_row(split, f"{size.documents:,}", f"{size.bytes / 1e6:.1f}", f"{size.tokens:,}", ratio)
    return table


if __name__ == "__main__":
    main()
