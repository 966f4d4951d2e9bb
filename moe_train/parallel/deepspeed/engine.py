"""The protocol `parallel.engine.Engine`, kept by DeepSpeed."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from moe_train.dist.parts import Part
from moe_train.models.transformer import Transformer
from moe_train.parallel.engine import NonFiniteGradientError


class State(Protocol):
    """Gradients and state of a stage: `state.ShardedState` or `state.WholeState`."""

    def norm(self) -> Tensor:
        """Return the gradient norm, fp64 scalar, equal on every rank."""

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients, where DeepSpeed does not clip them itself."""

    def discard(self) -> None:
        """Forget the gradients."""

    def parts(self) -> dict[str, Part]:
        """Return what this rank holds, by key."""

    def adopt(self) -> None:
        """Take over parts that were filled."""


class DeepSpeedEngine:
    """ZeRO of stage 0, 1 or 2 over the same model, exchange and data as `TorchEngine`; equal results in fp32.

    In bf16 DeepSpeed keeps the model's weights in bf16 and fp32 masters in the optimizer: what is computed in fp32
    (router, norms) uses weights that were rounded to bf16. Gradients are bf16 as a backward pass leaves them; they are
    added up, over micro-batches and ranks, in fp32.

    Args:
        model: of which DeepSpeed holds the weights; called as it is.
        wrapped: DeepSpeed's engine (`runtime.Runtime`).
        state: of its stage.
        clip_norm: largest gradient norm; DeepSpeed has to know it from the start.
    """

    def __init__(self, model: Transformer, wrapped: Any, state: State, clip_norm: float | None) -> None:
        self.model = model
        self.wrapped = wrapped
        self.state = state
        self.clip_norm = clip_norm

    def zero_grad(self) -> None:
        """Do nothing: DeepSpeed drops the gradients as it steps."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of one micro-batch's share of the loss; with the last, sum over the ranks."""
        self.wrapped.set_gradient_accumulation_boundary(is_last)
        # A tensor after the one that DeepSpeed's forward returned: were they one, its hook that divides gradients by
        # the number of micro-batches would run, without ZeRO, before the one that tells it not to.
        later = self.wrapped(loss).clone()
        self.wrapped.backward(later, scale_wrt_gas=False)
        if not is_last:
            self.wrapped.step()  # which only counts

    def step(self, learning_rate: float, clip_norm: float | None) -> Tensor:
        """Clip and update.

        Args:
            learning_rate: of this step.
            clip_norm: largest norm; that of the constructor.

        Returns:
            The gradient norm before clipping, fp64 scalar, equal on every rank.

        Raises:
            NonFiniteGradientError: on every rank, before any parameter changed.
        """
        assert clip_norm == self.clip_norm, f"DeepSpeed was built to clip at {self.clip_norm}, not at {clip_norm}"
        norm = self.state.norm()
        if not bool(norm.isfinite()):
            self.state.discard()
            raise NonFiniteGradientError(f"gradient norm is {norm.item()}")
        if clip_norm is not None:
            self.state.scale((clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.wrapped.basic_optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        self.wrapped.step()
        if not self.wrapped.was_step_applied():  # squares that overflow fp32, in which DeepSpeed takes its norm
            raise NonFiniteGradientError(f"gradient norm is {norm.item()}, too large for DeepSpeed")
        return norm

    def parts(self) -> dict[str, Part]:
        """Return weights and optimizer state by key, as the checkpoint names them: views, nothing is gathered."""
        return self.state.parts()

    def adopt(self, parts: dict[str, Part]) -> None:
        """Bring filled masters to the model on all ranks. Collective."""
        self.state.adopt()
