"""What makes a run the run it is, over versions of the schema."""

from __future__ import annotations

from moe_train.config.model import HOW_NOT_WHAT, FFNConfig, ModelConfig
from moe_train.training.setup import completed


def test_a_checkpoint_that_is_older_than_a_key_counts_as_having_its_default() -> None:
    """Runs from before LayerNorm, graphs and classifiers go on; what they do say stays."""
    now = ModelConfig(dim=48, ffn=FFNConfig(num_experts=4)).model_dump(mode="json", exclude=HOW_NOT_WHAT)
    older = {key: value for key, value in now.items() if key not in ("norm", "positions", "head_bias")}
    older["ffn"] = {key: value for key, value in now["ffn"].items() if key != "graph"}
    assert older != now
    language = {"kind": "language"}
    assert completed({"run.seed": 3, "model": older}) == {"run.seed": 3, "task": language, "model": now}
    sentiment = {"kind": "sentiment", "classes": ["bad", "good"]}
    assert completed({"task": sentiment, "model": older}) == {"task": sentiment, "model": now}


def test_another_value_still_differs() -> None:
    now = ModelConfig().model_dump(mode="json")
    other = completed({"model": {**now, "norm": "layer"}})["model"]
    assert other != now


def test_a_model_that_no_schema_knows_is_left_to_the_comparison() -> None:
    for saved in ({"model": {"width": 3}}, {"model": None}, {}):
        assert completed(saved) == saved


def test_how_experts_and_attention_are_computed_is_no_part_of_a_run() -> None:
    fast, plain = (
        ModelConfig.model_validate({"ffn": {"compute": experts}, "attention": {"kind": "gqa", "compute": attention}})
        for experts, attention in (("loop", "products"), ("reference", "fused"))
    )
    assert fast != plain
    assert completed({"model": fast.model_dump(mode="json")}) == completed({"model": plain.model_dump(mode="json")})
