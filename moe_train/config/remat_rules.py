"""Rules of recomputation and compilation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from moe_train.config.schema import TrainConfig
from moe_train.errors import Problem


def remat_problems(config: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield what is wrong between ``train.compile``, ``parallel.remat``, the model and this machine.

    Args:
        config: of the run.
        world_size: ranks; each rule holds for any number.
    """
    yield from compiler_problems(config)
    graph = config.model.ffn.graph
    if config.train.compile == "block" and graph is not None and graph.expert == "block":
        rule = "model.ffn.graph.expert=block calls each block by itself, with weights of its own: nothing is compiled"
        yield Problem("train.compile", "block", rule, "leave it out")


def compiler_problems(config: TrainConfig) -> Iterator[Problem]:
    """Yield that torch.compile would find no C++ compiler, which it needs for kernels on the CPU and for their calls.

    It takes the one that the environment variable CXX names, else g++.
    """
    if config.train.compile == "none":
        return
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        rule = f"needs a C++ compiler, and there is no {compiler}"
        yield Problem("train.compile", config.train.compile, rule, "install g++, or set CXX, or set train.compile=none")
