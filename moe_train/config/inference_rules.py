"""Rules between how a trained model is run and what it is."""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.inference import InferenceConfig
from moe_train.config.model import ModelConfig
from moe_train.errors import Problem


def inference_problems(inference: InferenceConfig, model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong between the keys of ``inference`` and a trained model.

    Args:
        inference: valid by itself.
        model: of the run, valid by itself.
    """
    if inference.offload is None:
        return
    remedy = "leave inference.offload out"
    if model.classifier is not None:
        yield Problem("inference.offload", None, "is for models that write text, and this one tells classes", remedy)
    elif model.ffn.num_experts == 0:
        rule = "leaves the experts of feed-forward layers on disk, and this model has none"
        yield Problem("inference.offload", None, rule, remedy)
    elif model.ffn.graph is not None:
        rule = (
            "every token visits all experts that are coupled by a graph (model.ffn.graph): "
            "each token would read the whole folder"
        )
        yield Problem("inference.offload", None, rule, f"{remedy}, or set parallel.ep to share them between ranks")
