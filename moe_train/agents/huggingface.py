"""An agent from a Hugging Face folder: loaded and run by transformers, which is imported here only."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.agents.agent import Answer, Message, require_text
from moe_train.agents.local import LocalAgent
from moe_train.agents.prompts import cut_note
from moe_train.config.agents import HuggingFaceAgent
from moe_train.config.schema import SampleConfig
from moe_train.errors import DataError, Problem

DTYPES: dict[str, str | torch.dtype] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


def load_folder(name: str, config: HuggingFaceAgent, device: torch.device) -> LocalAgent:
    """Return the agent of a folder.

    Raises:
        DataError: transformers cannot load it. Code in the folder is not run, and nothing is downloaded.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    path, options = Path(config.path).expanduser(), {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[config.dtype], **options)
    except Exception as error:  # transformers raises whatever its parts raise
        rule = f"transformers cannot load it: {str(error).strip().partition(chr(10))[0]}"
        key = f"mixture.agents.{name}.path"
        raise DataError(Problem(key, config.path, rule, "name a folder with a causal language model")) from error
    model = model.to(device).eval()
    is_chat = bool(getattr(tokenizer, "chat_template", None))
    return LocalAgent(
        name, is_chat, config.timeout_s, model, lambda sent, seed: complete(model, tokenizer, config.sample, sent, seed)
    )


@torch.no_grad()
def complete(model: Any, tokenizer: Any, sample: SampleConfig, sent: Sequence[Message], seed: int) -> Answer:
    """Return the continuation of a chat or a text.

    Raises:
        AgentError: it is empty.
    """
    ids_BS = prompt_ids(tokenizer, sent)
    read_BS, note = fitted(ids_BS, getattr(model.config, "max_position_embeddings", None), sample.max_tokens)
    read_BS = read_BS.to(model.device)
    devices = [model.device] if model.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
        torch.manual_seed(sample.seed + seed)
        tokens_BS = model.generate(
            read_BS,
            attention_mask=torch.ones_like(read_BS),
            max_new_tokens=sample.max_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **drawing(sample),
        )
    said_S = tokens_BS[0, read_BS.shape[1] :]
    text = require_text(str(tokenizer.decode(said_S, skip_special_tokens=True)))
    return Answer(text, "length" if len(said_S) >= sample.max_tokens else "stop", note)


def drawing(sample: SampleConfig) -> dict[str, Any]:
    """Return how transformers is to draw; ``top_k=0`` keeps it from looking at the 50 best tokens only."""
    if sample.temperature == 0.0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": sample.temperature, "top_p": sample.top_p, "top_k": 0}


def prompt_ids(tokenizer: Any, sent: Sequence[Message]) -> Tensor:
    """Return the tokens of what is sent, [1, S]."""
    if sent[0].role == "text":
        ids_BS: Tensor = tokenizer(sent[0].content, return_tensors="pt").input_ids
        return ids_BS
    try:
        return templated(tokenizer, sent)
    except Exception:  # some templates refuse a system message, each with an error of its own
        joined = "\n\n".join(message.content for message in sent)
        return templated(tokenizer, [Message("user", joined)])


def templated(tokenizer: Any, sent: Sequence[Message]) -> Tensor:
    """Return the tokens of a chat by the tokenizer's template, up to where the answer begins, [1, S]."""
    chat = [{"role": message.role, "content": message.content} for message in sent]
    ids_BS: Tensor = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return ids_BS


def fitted(ids_BS: Tensor, positions: int | None, max_tokens: int) -> tuple[Tensor, str]:
    """Return the end of a prompt that leaves room for the answer, [1, S], and a note where something was cut off."""
    length = ids_BS.shape[1]
    room = max(1, positions - max_tokens) if positions is not None else length
    return ids_BS[:, -room:], cut_note(length, room)
