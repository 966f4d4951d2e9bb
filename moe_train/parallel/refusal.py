"""What becomes of a gradient that is infinite or not a number: no update, and an error."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteGradientError(Exception):
    """The gradient norm is infinite or not a number: the update was not made."""


class LateRefusal:
    """Refuses an update on the device, and tells the host a step later.

    A host that read the norm before each update would wait for all the device has been given; one that reads it a step
    later finds it there. Fused optimizers of torch look at ``found_inf`` and change nothing where it is 1.

    Args:
        optimizer: fused.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        assert getattr(optimizer, "_step_supports_amp_scaling", False), "only fused optimizers refuse by themselves"
        self.optimizer = optimizer
        self._told: tuple[Tensor, torch.Event | None] | None = None

    def watch(self, norm: Tensor) -> None:
        """Have the next update made only if the gradient norm (scalar) is finite."""
        self.optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        is_device = norm.device.type != "cpu"
        host = torch.empty((), dtype=norm.dtype, pin_memory=is_device)
        host.copy_(norm, non_blocking=True)
        event = None
        if is_device:
            event = torch.Event(norm.device)
            event.record()
        self._told = host, event

    def settle(self) -> None:
        """Raise if the last update was refused; waits for that step alone.

        Raises:
            NonFiniteGradientError: parameters and moments are those before that step.
        """
        told, self._told = self._told, None
        if told is None:
            return
        norm, event = told
        if event is not None:
            event.synchronize()
        if not bool(norm.isfinite()):
            raise NonFiniteGradientError(f"gradient norm of the last step is {norm.item()}: it was not made")
