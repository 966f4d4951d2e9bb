"""What changes over the steps of a training."""

from __future__ import annotations

from moe_train.config.schema import TrainConfig
from moe_train.ops.random import derive_seed
from moe_train.training.optim import learning_rate
from moe_train.training.step import StepSettings


def settings_at(step: int, config: TrainConfig, boundary_id: int | None) -> StepSettings:
    """Return the settings of optimizer step ``step`` (from 0).

    Everything is a function of the step and the configuration, so that a resumed run goes on as it would have.

    Args:
        step: optimizer steps done before.
        config: of the run.
        boundary_id: token that ends a document.
    """
    done = step / config.train.steps
    mtp, loss_free = config.model.mtp, config.model.ffn.balance.loss_free
    return StepSettings(
        learning_rate=learning_rate(step, config.train.steps, config.optim),
        clip_norm=config.train.clip_norm,
        seed=derive_seed(config.run.seed, step),
        mtp_coef=mtp.coef if done < mtp.late_after else mtp.late_coef,
        moves_biases=loss_free is not None and done < loss_free.freeze_after,
        boundary_id=boundary_id,
    )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after ``step`` steps."""
    return every > 0 and step % every == 0
