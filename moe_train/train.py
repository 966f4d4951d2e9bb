"""Train a model: ``python -m moe_train.train KEY=VALUE ...``, or under torchrun for several ranks."""

from __future__ import annotations

from moe_train.config.door import door
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig


@door("train", TrainConfig, train_problems)
def main(config: TrainConfig) -> None:
    """Train."""
    print(config)


if __name__ == "__main__":
    main()
