"""Hugging Face folders as agents: small random models, with and without a template for chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.agents.agent import AgentError, Message
from moe_train.agents.huggingface import fitted, load_folder
from moe_train.config.agents import HuggingFaceAgent
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError

CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and strict %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}"
    "{% endfor %}[assistant]"
)
SENT = (Message("system", "Merge."), Message("user", "Why?"))


def write_folder(folder: Path, template: str | None) -> Path:
    """A random model over bytes, and its tokenizer."""
    transformers: Any = pytest.importorskip("transformers")
    Tokenizer.of_bytes().save(folder / "bytes.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bytes.json"), eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def agent(folder: Path, **sample: Any):
    given = {"max_tokens": 8, "temperature": 5.0, "top_p": 1.0} | sample
    config = HuggingFaceAgent.model_validate({"path": str(folder), "sample": given})
    return load_folder("hf", config, torch.device("cpu"))


def prompt_of(model_agent, sent, monkeypatch) -> str:
    """The text that the model reads."""
    read = []
    inner = model_agent.model.generate
    monkeypatch.setattr(model_agent.model, "generate", lambda ids, **more: (read.append(ids), inner(ids, **more))[1])
    model_agent.ask(sent, 0, lambda attempt: None)
    return Tokenizer.of_bytes().decode(read[0][0].tolist())


@pytest.mark.slow
def test_a_base_model_continues_the_text(tmp_path, monkeypatch):
    found = agent(write_folder(tmp_path, None))
    assert not found.is_chat and found.is_local
    sent = (Message("text", "Once upon"),)
    before = torch.random.get_rng_state()
    told = []
    answers = [found.ask(sent, seed, told.append).text for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2], "the seed of the call is that of the draw"
    assert torch.equal(torch.random.get_rng_state(), before) and len(told) == 3
    greedy = agent(tmp_path, temperature=0.0)
    assert greedy.ask(sent, 0, told.append) == greedy.ask(sent, 1, told.append)
    assert prompt_of(found, sent, monkeypatch) == "Once upon"


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_chat_model_gets_its_template(strict, tmp_path, monkeypatch):
    """A template that refuses system messages gets what they say in front of the request."""
    template = CHAT.replace(" and strict", "" if strict else " and false")
    found = agent(write_folder(tmp_path, template))
    assert found.is_chat
    wanted = "[user]Merge.\n\nWhy?[assistant]" if strict else "[system]Merge.[user]Why?[assistant]"
    assert prompt_of(found, SENT, monkeypatch) == wanted


@pytest.mark.slow
def test_a_prompt_that_is_too_long_loses_its_beginning_and_late_text_is_stopped(tmp_path, monkeypatch):
    found = agent(write_folder(tmp_path, None))
    long = (Message("text", "x" * 100 + "the end"),)
    assert found.ask(long, 0, lambda attempt: None).note == "the prompt has 107 tokens, the model reads the last 56"
    assert prompt_of(found, long, monkeypatch).endswith("the end")
    late = type(found)(found.name, found.is_chat, 1e-9, found.model, found.complete)
    with pytest.raises(AgentError, match="no answer in"):
        late.ask(long, 0, lambda attempt: None)


@pytest.mark.slow
def test_a_folder_that_holds_no_model(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "surely_unknown"}')
    with pytest.raises(DataError, match=r"mixture.agents.hf.path=.*transformers cannot load it"):
        agent(tmp_path)


def test_room_for_the_answer():
    ids_BS = torch.arange(10)[None]
    assert fitted(ids_BS, None, 99)[0].tolist() == ids_BS.tolist() and fitted(ids_BS, 20, 10)[1] == ""
    assert fitted(ids_BS, 12, 8)[0].tolist() == [[6, 7, 8, 9]] and "reads the last 4" in fitted(ids_BS, 12, 8)[1]
    assert fitted(ids_BS, 12, 99)[0].tolist() == [[9]]
