"""Train a model: ``python -m moe_train.train KEY=VALUE ...``, or under torchrun for several ranks."""

from __future__ import annotations

from moe_train.config.process import settle

if __name__ == "__main__":
    settle("moe_train.train")  # before anything slow is imported: it may start this process anew

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.door import door
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.observe.finished import is_passed_by

if TYPE_CHECKING:
    from moe_train.training.setup import Run

PROMPT = "ROMEO:\n"
"""Start of the text sample at the end of a run."""


def prepare(mapping: dict[str, Any], explicit: frozenset[str]) -> dict[str, Any]:
    """Take the architecture of model.init_from where model.adopt asks for it."""
    model = mapping.get("model", {})
    if not (model.get("adopt") and model.get("init_from")):
        return mapping
    from moe_train.interop.adopt import adopted

    return adopted(mapping, explicit)


@door("train", TrainConfig, train_problems, prepare)
def main(config: TrainConfig) -> None:
    """Train, evaluate on all held-out text, write the report and, of a language model, a text sample.

    A run that was asked to stop by a signal saves and exits with 128 + the signal's number.
    """
    if config.run.skip_finished and is_passed_by(config):
        return
    # Imported here: a mistake in the configuration must be answered before torch is loaded.
    from moe_train.dist.world import world_from_environment
    from moe_train.interop.beginning import begin
    from moe_train.training.loop import fit
    from moe_train.training.setup import build_run
    from moe_train.training.signals import stop_launcher

    with world_from_environment(config.parallel.timeout_s) as world:
        run = build_run(config, world, begin)
        outcome = fit(run)
        text = "" if outcome.signal or not run.task.writes_text else sample_text(run)
        told = run.task.closing(outcome.final) if outcome.final else []
        # The others wait: torchrun terminates every rank as soon as one ends with a status other than 0.
        world.leader_first(lambda: finish(run.folder, outcome.step, text, told))
    if outcome.signal:
        if outcome.is_elsewhere:
            stop_launcher()
        sys.exit(128 + outcome.signal)


def sample_text(run: Run) -> str:
    """Return a continuation of the default prompt. Collective."""
    from moe_train.inference.sampler import generate

    config, tokenizer = run.config, run.texts.tokenizer
    prompt = tokenizer.encode(PROMPT)
    continuation = generate(run.engine.model, prompt, config.sample, tokenizer.boundary_id, config.data.seq_len)
    return PROMPT + tokenizer.decode(continuation)


def finish(folder: Path, step: int, text: str, told: list[str]) -> None:
    """Write the sample and the report, and tell the final figures and where everything lies."""
    from moe_train.observe.report import write_report

    if text:
        samples = folder / "samples"
        samples.mkdir(exist_ok=True)
        (samples / f"step_{step:08d}.txt").write_text(text)
    report = write_report(folder)
    lines = [f"\n--- sample ---\n{text}\n--------------"] if text else []
    lines += [*told, f"run:    {folder.resolve()}", f"report: {report.resolve()}"]
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
