"""What stands beside the weights: config.json, tokenizer and generation settings, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.config.schema import SampleConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.interop.families.base import Family

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def companions(
    family: Family, config: TrainConfig, tokenizer: Tokenizer, tokenizer_file: Path, dtype: str
) -> dict[str, bytes]:
    """Return the contents of the JSON files by name.

    Args:
        family: says what config.json is.
        config: of the training.
        tokenizer: of the training.
        tokenizer_file: the run's tokenizer.json.
        dtype: of the weights, ``fp32`` or ``bf16``.
    """
    return {
        "config.json": _json(public_config(family, config, tokenizer, dtype)),
        "generation_config.json": _json(generation_config(config.sample, tokenizer.boundary_id)),
        "tokenizer.json": without_additions(tokenizer_file.read_bytes()),
        "tokenizer_config.json": _json(tokenizer_config(tokenizer.boundary_token, longest_text(config))),
    }


def public_config(family: Family, config: TrainConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return config.json: the family's, with token ids, number format and longest text."""
    boundary = tokenizer.boundary_id
    return {
        "architectures": [family.class_name],
        **family.public_config(config.model, config.model.vocab_size or tokenizer.vocab_size),
        # A document begins after the boundary that ended the one before.
        "bos_token_id": boundary,
        "eos_token_id": boundary,
        "max_position_embeddings": longest_text(config),
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],  # the name before transformers 4.56, which other programs still read
    }


def longest_text(config: TrainConfig) -> int:
    """Return the longest text that the model is meant for, in tokens."""
    stretching = config.model.attention.yarn or config.model.attention.llama3
    return config.data.seq_len if stretching is None else round(stretching.factor * stretching.original_length)


def generation_config(sample: SampleConfig, boundary: int) -> dict[str, Any]:
    """Return generation_config.json: how ``moe_train.generate`` continues a text."""
    common = {"bos_token_id": boundary, "eos_token_id": boundary, "max_new_tokens": sample.max_tokens}
    if sample.temperature == 0.0:
        return {**common, "do_sample": False}
    # Without top_k: 0 transformers would sample from the 50 best only.
    return {**common, "do_sample": True, "temperature": sample.temperature, "top_p": sample.top_p, "top_k": 0}


def tokenizer_config(boundary_token: str, longest: int) -> dict[str, Any]:
    """Return tokenizer_config.json: the same ids as in training, and nothing added at either end."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": boundary_token,
        "eos_token": boundary_token,
        "model_max_length": longest,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # The name of the boundary in a text is text, as in training: no text can forge one.
        "split_special_tokens": True,
    }


def without_additions(content: bytes) -> bytes:
    """Return a tokenizer.json that adds no tokens at either end; the training never let it."""
    pipeline: Mapping[str, Any] = json.loads(content)
    return _json({**pipeline, "post_processor": None})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
