"""DeepSpeed's JSON: nothing that matters is left to a default, and the batch adds up."""

import json

import pytest

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.parallel.deepspeed.settings import settings_of, write_settings


def settings_with(world_size, *keys):
    keys = ("parallel.engine=deepspeed", "train.global_batch=24", *keys)
    return settings_of(compose_config("train", TrainConfig, lambda config: [], list(keys)), world_size)


def test_it_is_json_and_all_of_it_is_said():
    settings = settings_with(4, "train.micro_batch=3", "train.clip_norm=0.7", "train.precision=bf16")
    assert json.loads(json.dumps(settings)) == settings == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.7,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 1,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "overlap_comm": False,
            "allgather_partitions": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }  # fmt: skip


def test_clipping_is_always_written_for_its_default_is_one():
    assert settings_with(1, "train.clip_norm=null")["gradient_clipping"] == 0.0


def test_without_zero_we_clip_ourselves():
    assert settings_with(1, "parallel.zero_stage=0", "train.clip_norm=0.7")["gradient_clipping"] == 0.0


def test_offloading_and_precision_are_passed_on():
    settings = settings_with(2, "parallel.offload=true", "parallel.zero_stage=2")
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert not settings["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("world_size", "keys"), [(1, ()), (2, ("train.micro_batch=4",)), (8, ("train.micro_batch=1",))]
)
def test_the_batch_adds_up(world_size, keys):
    settings = settings_with(world_size, *keys)
    per_rank = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    assert per_rank * world_size == settings["train_batch_size"] == 24


def test_the_file_holds_what_deepspeed_is_told(tmp_path):
    config = compose_config("train", TrainConfig, lambda config: [], ["parallel.engine=deepspeed"])
    write_settings(tmp_path / "deepspeed.json", config, 2)
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == settings_of(config, 2)
