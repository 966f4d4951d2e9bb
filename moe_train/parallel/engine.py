"""What executes an optimizer step: the protocol, and torch's own engine."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moe_train.dist.mesh import Mesh
from moe_train.dist.parts import Part
from moe_train.models.transformer import Transformer
from moe_train.parallel.gradients import Gradients, WholeGradients
from moe_train.parallel.refusal import LateRefusal, NonFiniteGradientError
from moe_train.parallel.shard import ShardedGradients, keep_shards_only
from moe_train.parallel.state import model_parts, optimizer_parts

__all__ = ["Engine", "NonFiniteGradientError", "TorchEngine", "materialise"]


class Engine(Protocol):
    """A model with its optimizer, over all ranks."""

    @property
    def model(self) -> Transformer:
        """The model as this rank holds it."""

    def zero_grad(self) -> None:
        """Start a step."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of one micro-batch's share of the loss, which may be the last of the step."""

    def step(self, learning_rate: float, clip_norm: float | None) -> Tensor:
        """Reduce, clip and update; return the gradient norm before clipping."""

    def parts(self) -> dict[str, Part]:
        """Return the state to save, by key; loading fills it in place."""

    def adopt(self, parts: dict[str, Part]) -> None:
        """Take over the result of `parts` after it was filled: an engine may have returned copies."""


class TorchEngine:
    """Experts sharded over EP groups, dense parameters replicated or sharded, torch's optimizer.

    Args:
        model: with initial values, on its device; sharded where the mesh says so.
        optimizer: over the model's parameters.
        mesh: the groups.
        waits: whether the host waits for the norm before the update. None: only where that costs nothing (on a CPU), or
            where the optimizer cannot refuse an update by itself.
    """

    gradients: Gradients

    def __init__(
        self, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh, waits: bool | None = None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.gradients = WholeGradients(model, mesh) if mesh.sharding is None else ShardedGradients(model, mesh)
        if waits is None:
            waits = model.embedding_VD.device.type == "cpu" or mesh.sharding is not None
        self.refusal = None if waits else LateRefusal(optimizer)
        materialise(optimizer)

    def zero_grad(self) -> None:
        """Start a step."""
        self.gradients.zero()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of one micro-batch's share of the loss, which may be the last of the step."""
        self.gradients.expect(is_last)
        torch.autograd.backward(loss)

    def step(self, learning_rate: float, clip_norm: float | None) -> Tensor:
        """Reduce, clip and update.

        Args:
            learning_rate: of this step.
            clip_norm: largest norm; None: no clipping.

        Returns:
            The gradient norm before clipping, fp64 scalar, equal on every rank.

        Raises:
            NonFiniteGradientError: on every rank, before any parameter changed; where the host does not wait for the
                norm, by the next call or the next `parts`, with the same parameters.
        """
        self.settle()
        self.gradients.reduce()
        norm = self.gradients.norm()
        if self.refusal is not None:
            self.refusal.watch(norm)
        elif not bool(norm.isfinite()):
            name = self.gradients.first_nonfinite()
            raise NonFiniteGradientError(f"gradient norm is {norm.item()}; first bad parameter here: {name or 'none'}")
        if clip_norm is not None:
            self.clip((clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        self.optimizer.step()
        return norm

    def clip(self, factor: Tensor) -> None:
        """Multiply the gradients with a scalar; one that the host knows to be 1 is spared."""
        if factor.device.type != "cpu" or factor.item() != 1.0:
            self.gradients.scale(factor)

    def settle(self) -> None:
        """Raise what the last step could not know yet."""
        if self.refusal is not None:
            self.refusal.settle()

    def parts(self) -> dict[str, Part]:
        """Return weights and optimizer state by key, as the checkpoint names them."""
        self.settle()
        keep_shards_only(self.model)
        return model_parts(self.model) | optimizer_parts(self.model, self.optimizer)

    def adopt(self, parts: dict[str, Part]) -> None:
        """Do nothing: the parts are the state itself."""


def materialise(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its Adam state now: a checkpoint has the same keys at every step, also at step 0."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if group.get("fused") else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
