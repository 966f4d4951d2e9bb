"""The random state of a process, as bytes (never a pickle)."""

from __future__ import annotations

import torch


def random_state(device: torch.device) -> bytes:
    """Return the state of the CPU's generator, followed by that of the accelerator if there is one."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)


def restore_random_state(state: bytes, device: torch.device) -> None:
    """Set the generators to a state made by `random_state`."""
    values = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    cpu_size = torch.get_rng_state().numel()
    torch.set_rng_state(values[:cpu_size])
    if device.type != "cpu" and values.numel() > cpu_size:
        torch.get_device_module(device).set_rng_state(values[cpu_size:], device)
