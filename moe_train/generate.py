"""Continue a text with a trained model: ``python -m moe_train.generate run.dir=DIR prompt="..."``."""

from __future__ import annotations

from moe_train.config.process import settle

if __name__ == "__main__":
    settle("moe_train.generate")  # before anything slow is imported: it may start this process anew

from pathlib import Path

from moe_train.config.door import door
from moe_train.config.schema import GenerateConfig


@door("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Print the prompt and its continuation."""
    from moe_train.checkpoint.runs import require_writer
    from moe_train.dist.world import world_from_environment
    from moe_train.inference.load import load_trained
    from moe_train.inference.sampler import generate

    with world_from_environment(config.parallel.timeout_s) as world:
        run_dir = Path(config.run.dir).expanduser()
        world.leader_first(lambda: require_writer(run_dir))
        trained = load_trained(run_dir, config.checkpoint, config.parallel, world, config.inference)
        tokenizer = trained.tokenizer
        # A text without a beginning starts like a document: after a boundary.
        prompt = tokenizer.encode(config.prompt) or [tokenizer.boundary_id]
        context = trained.config.data.seq_len
        remember = config.inference.remember
        tokens = generate(trained.model, prompt, config.sample, tokenizer.boundary_id, context, remember)
        if world.is_leader:
            print(config.prompt + tokenizer.decode(tokens))  # noqa: T201
        trained.tell_traffic(world)


if __name__ == "__main__":
    main()
