"""What DeepSpeed is told: its own JSON, from our configuration, with nothing left to its defaults that matters here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_train.config.schema import TrainConfig


def settings_of(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run: plain JSON values.

    Args:
        config: validated; of its keys only those of batch, precision, clipping, stage and offloading reach DeepSpeed.
        world_size: number of ranks.
    """
    train = config.train
    micro_batch = train.micro_batch or train.global_batch // world_size
    is_bf16 = train.precision == "bf16"
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": train.global_batch // (micro_batch * world_size),
        # Losses are divided once by the global number of tokens: every reduction is a plain sum.
        "gradient_allreduce_op": "sum",
        "gradient_clipping": gradient_clipping(config),
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # Bad gradients are found before DeepSpeed is asked to step: it would skip the step and go on.
        "bf16": {"enabled": is_bf16, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": zero_settings(config),
        # The optimizer is ours, torch's fused AdamW, also on the host: DeepSpeed's own there is built by a compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def gradient_clipping(config: TrainConfig) -> float:
    """Return the norm at which DeepSpeed clips; 0: never, which has to be said, as it clips at 1 when told nothing.

    Without ZeRO it would clip by the mean of the ranks' norms, which with experts is not the norm: there we clip.
    """
    return config.train.clip_norm or 0.0 if config.parallel.zero_stage else 0.0


def zero_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the section of ZeRO. Each value that is not ours to choose is one that was measured to be right."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if config.parallel.offload else {}
    return {
        "stage": config.parallel.zero_stage,
        "contiguous_gradients": True,  # without, stage 1 sums the gradients of experts wrongly
        "reduce_scatter": True,  # without, experts are refused
        "round_robin_gradients": False,  # `state` relies on the order of parameters in a partition
        "overlap_comm": False,  # reductions beside the exchange of a recomputed block could meet in different orders
        "allgather_partitions": True,
        **offload,
    }


def write_settings(path: Path, config: TrainConfig, world_size: int) -> None:
    """Write what DeepSpeed is told into the run folder."""
    path.write_text(json.dumps(settings_of(config, world_size), indent=1) + "\n", encoding="utf-8")
