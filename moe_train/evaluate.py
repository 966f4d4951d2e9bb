"""Evaluate a run on its held-out text: ``python -m moe_train.evaluate run.dir=DIR``, or under torchrun."""

from __future__ import annotations

from moe_train.config.process import settle

if __name__ == "__main__":
    settle("moe_train.evaluate")  # before anything slow is imported: it may start this process anew

import json
from pathlib import Path

from moe_train.config.door import door
from moe_train.config.schema import EvaluateConfig


@door("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Print loss, perplexity and bits per byte as one JSON object."""
    from moe_train.data.corpus import open_corpus
    from moe_train.dist.world import world_from_environment
    from moe_train.inference.load import load_trained
    from moe_train.training.evaluate import evaluate

    with world_from_environment(config.parallel.timeout_s) as world:
        run_dir = Path(config.run.dir).expanduser()
        trained = load_trained(run_dir, config.checkpoint, config.parallel, world, config.inference)
        train = trained.config.train
        corpus = open_corpus(trained.config.data, trained.config.tokenizer, world.leader_first)
        rows = max(1, (train.micro_batch or train.global_batch) // world.size)
        limit = (
            None if config.eval.batches is None else -(-config.eval.batches * train.global_batch // (rows * world.size))
        )
        figures = evaluate(trained.model, corpus.heldout, world, trained.mesh, trained.config.data.seq_len, rows, limit)
        if world.is_leader:
            print(json.dumps({"step": trained.checkpoint.step, **figures}, indent=1))  # noqa: T201
        trained.tell_traffic(world)


if __name__ == "__main__":
    main()
