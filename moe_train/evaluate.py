"""Evaluate a run on its held-out text: ``python -m moe_train.evaluate run.dir=DIR``, or under torchrun."""

from __future__ import annotations

from moe_train.config.process import settle

if __name__ == "__main__":
    settle("moe_train.evaluate")  # before anything slow is imported: it may start this process anew

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.door import door
from moe_train.config.schema import EvaluateConfig

if TYPE_CHECKING:
    from moe_train.dist.world import World
    from moe_train.inference.load import Trained


@door("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Print the figures of the held-out texts as JSON, or the class of ``text`` and the experts that took it."""
    from moe_train.checkpoint.runs import require_classifier
    from moe_train.dist.world import world_from_environment
    from moe_train.inference.load import load_trained

    with world_from_environment(config.parallel.timeout_s) as world:
        run_dir = Path(config.run.dir).expanduser()
        if config.text is not None:
            world.leader_first(lambda: require_classifier(run_dir))
        trained = load_trained(run_dir, config.checkpoint, config.parallel, world, config.inference)
        told = heldout_figures(config, trained, world) if config.text is None else explanation(config.text, trained)
        if world.is_leader:
            print(readable({"step": trained.checkpoint.step, **told}))  # noqa: T201
        trained.tell_traffic(world)


def heldout_figures(config: EvaluateConfig, trained: Trained, world: World) -> dict[str, Any]:
    """Return what the run's task measures on its held-out texts. Collective."""
    from moe_train.errors import DataError, Problem
    from moe_train.training.tasks import open_task

    train, batches = trained.config.train, config.eval.batches
    rows = max(1, (train.micro_batch or train.global_batch) // world.size)
    limit = None if batches is None else -(-batches * train.global_batch // (rows * world.size))
    figures = open_task(trained.config, world.leader_first).evaluate(trained.model, world, trained.mesh, rows, limit)
    if not figures:
        raise DataError(Problem("data.heldout_fraction", None, "the run holds no text out", "train with some held out"))
    return figures


def explanation(text: str, trained: Trained) -> dict[str, Any]:
    """Return the class of a text, its probabilities, and the experts of each layer that took it. Collective."""
    from moe_train.inference.classify import explain

    return explain(trained, text).as_json()


def readable(told: dict[str, Any], indent: int = 1) -> str:
    """Return a mapping as JSON with one line per key; lists stay on theirs."""
    margin = " " * indent
    lines = [
        f"{margin}{json.dumps(key)}: {readable(value, indent + 1) if isinstance(value, dict) else json.dumps(value)}"
        for key, value in told.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{margin[1:]}}}" if lines else "{}"


if __name__ == "__main__":
    main()
