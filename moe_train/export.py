"""Write a run as a folder that others load: ``python -m moe_train.export run.dir=DIR to=DIR``, or under torchrun."""

from __future__ import annotations

from pathlib import Path

from moe_train.config.door import door
from moe_train.config.schema import ExportConfig


@door("export", ExportConfig)
def main(config: ExportConfig) -> None:
    """Print what was written, what was compared, and how to load it."""
    from moe_train.checkpoint.runs import read_config, require_writer
    from moe_train.dist.world import world_from_environment
    from moe_train.inference.load import load_trained
    from moe_train.interop.card import how_to_load
    from moe_train.interop.publish import Subject, preflight, publish

    with world_from_environment(config.parallel.timeout_s) as world:
        run_dir, to = Path(config.run.dir).expanduser(), Path(config.to).expanduser()
        world.leader_first(lambda: require_writer(run_dir))
        world.leader_first(lambda: preflight(config, read_config(run_dir).model))
        choice = preflight(config, read_config(run_dir).model)
        trained = load_trained(run_dir, config.checkpoint, config.parallel, world)
        step = trained.checkpoint.step
        subject = Subject(trained.config, trained.tokenizer, trained.model, trained.mesh, run_dir, step)
        exported = publish(config, choice, subject, world)
        if not world.is_leader:
            return
        if choice.reasons:
            reasons = "".join(f"  {reason}\n" for reason in choice.reasons)
            print(f"no public class expresses this model; it is in the project's own layout:\n{reasons}")  # noqa: T201
        count, size = len(exported.written.files), exported.written.total_bytes / 1e9
        print(f"step {step} as {choice.family.class_name} in {to}: {count} file(s), {size:.3g} GB")  # noqa: T201
        print(exported.receipt or "nothing was compared (verify=false)")  # noqa: T201
        print(f"\n{how_to_load(choice.family).replace('FOLDER', str(to))}")  # noqa: T201


if __name__ == "__main__":
    main()
