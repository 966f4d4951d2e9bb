"""Memory and model FLOPs utilisation of the device."""

from __future__ import annotations

import torch

from moe_train.config.schema import TrainConfig
from moe_train.dist.world import World
from moe_train.models.counts import count
from moe_train.observe.metrics import BYTES_PER_GIB, peak_memory_gib

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 peak per device in FLOP/s, from the makers' data sheets, by a part of the device's name."""


def memory_gib(device: torch.device) -> float:
    """Return the most memory this process has held so far: of the accelerator, or resident on a CPU, in GiB."""
    if device.type == "cpu":
        return peak_memory_gib()
    return torch.accelerator.max_memory_allocated(device) / BYTES_PER_GIB


def model_flops_utilisation(config: TrainConfig, vocab_size: int, world: World, tokens_per_s: float) -> float | None:
    """Return the share of the devices' peak that the model's FLOPs take (PaLM, arXiv 2204.02311, appendix B).

    None where the peak is not known: on a CPU, on other devices, and in other precisions than bf16.
    """
    if world.device.type == "cpu" or config.train.precision != "bf16":
        return None
    name = torch.get_device_module(world.device).get_device_name(world.device)
    peak = next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
    if peak is None:
        return None
    flops = count(config.model, vocab_size, config.data.seq_len).training_flops_per_token
    return flops * tokens_per_s / (peak * world.size)
