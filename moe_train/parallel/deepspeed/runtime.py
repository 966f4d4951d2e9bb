"""DeepSpeed itself, made quiet, on our process groups, and told that there are experts.

The one file that imports it. What begins with an underscore here is no promise of DeepSpeed's: its version is pinned.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to ourselves what DeepSpeed prints, logs and warns of while it starts; errors are still raised."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


if torch.accelerator.current_accelerator() is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it is read at import
with quiet():
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups


class Client(nn.Module):
    """Holds the model for DeepSpeed, which hangs its hooks on what a forward pass returns.

    It looks for tensors in tuples, lists and dicts, and would find none in our result; so it is given the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Tensor) -> Tensor:
        """Return the loss as it is."""
        return loss


class Runtime(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeed's engine for a model whose experts and exchange are not DeepSpeed's."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        """Look at the parameters for experts, where DeepSpeed looks for modules of its own class."""
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(not getattr(p, "allreduce", True) for p in model.parameters())

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
        """Choose the ZeRO optimizer wherever there is ZeRO: for one case of bf16 DeepSpeed has a second one."""
        chosen = super()._do_optimizer_sanity_check(basic_optimizer)
        return "zero_optimization" if self.zero_optimization() else chosen


def start(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], mesh: Mesh, world: World
) -> Runtime:
    """Return DeepSpeed's engine around the model. Collective.

    Args:
        model: with its first values, which DeepSpeed copies: later changes by others are lost.
        optimizer: whose groups of experts are marked; its parameters become DeepSpeed's flat ones.
        settings: from `settings_of`.
        mesh: whose groups DeepSpeed takes over.
        world: the processes.
    """
    # At every step it calls torch by a name that torch has given up.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))  # what torchrun says, for a single process
    with quiet():
        # None of the operators that DeepSpeed compiles is used here; it would build one for the host as it starts.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed()  # adopts the process group that there is
        lend_groups(mesh, world)
        return Runtime(
            args=None, model=Client(model), optimizer=optimizer, config=settings, config_class=DeepSpeedConfig(settings)
        )


def lend_groups(mesh: Mesh, world: World) -> None:
    """Give DeepSpeed our groups of experts, and a group of all ranks with our timeout; it would make all without one.

    Its collectives over all ranks have a group of their own: they may run beside those of the model.
    """
    name = group_name(mesh)
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(mesh.ep)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(mesh.edp)
    groups._WORLD_GROUP = dist.new_group(list(range(world.size)), timeout=timedelta(seconds=world.timeout_s))


def group_name(mesh: Mesh) -> str:
    """Return DeepSpeed's name for the groups of experts of this size."""
    return f"ep_size_{mesh.layout.ep}"
