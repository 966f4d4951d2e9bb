"""What stands beside the weights: transformers reads the same tokens, lengths and settings as the run had."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from moe_train.config.schema import SampleConfig, TokenizerConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.interop.card import heldout_loss, model_card
from moe_train.interop.companions import companions, generation_config, longest_text
from moe_train.interop.families import FAMILIES
from moe_train.interop.families.llama import Llama
from moe_train.interop.native import NATIVE

TEXT = [
    "The quick brown fox jumps over 12 dogs.",
    "  spaces \n\n lines ",
    "déjà vu — 漢字 🙂",
    "a <|endoftext|> b </s> c",
    "",
]


def bpe():
    return Tokenizer.train_bpe([" ".join(TEXT) * 20], TokenizerConfig(vocab_size=300))


def file_that_adds_tokens():
    """A tokenizer as published ones are: words, with a token added at the beginning and at the end."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "quick", "a", "b", "c", ".", "12"])}
    pipeline = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.add_special_tokens(["<s>", "</s>"])
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pipeline.enable_truncation(3)
    return Tokenizer(pipeline, "</s>")


KINDS = {"bytes": Tokenizer.of_bytes, "bpe": bpe, "file": file_that_adds_tokens}
DENSE = TrainConfig.model_validate({"model": {"layers": 2, "dim": 32, "heads": 2}, "data": {"seq_len": 48}})


def written(folder: Path, tokenizer: Tokenizer, config: TrainConfig = DENSE, public: dict | None = None) -> Path:
    run_file = folder / "run" / "tokenizer.json"
    run_file.parent.mkdir(parents=True)
    tokenizer.save(run_file)
    files = companions(Llama(), config, tokenizer, run_file, "bf16")
    if public is not None:
        files["config.json"] = json.dumps(public).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Our tokenizer and the one that transformers makes of the folder."""
    ours = KINDS[request.param]()
    return ours, AutoTokenizer.from_pretrained(written(tmp_path_factory.mktemp("tokenizer"), ours))


@pytest.mark.parametrize("text", TEXT)
def test_texts_have_the_same_tokens(both, text):
    ours, theirs = both
    assert theirs(text)["input_ids"] == theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_has_the_same_tokens(both, text):
    ours, theirs = both
    assert theirs(text)["input_ids"] == ours.encode(text)


def test_special_tokens_are_those_of_the_run(both):
    ours, theirs = both
    assert (theirs.eos_token, theirs.eos_token_id) == (ours.boundary_token, ours.boundary_id)
    assert theirs.model_max_length == 48 and len(theirs) == ours.vocab_size


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_family_brings_a_tokenizer_of_its_own(tmp_path, model_type):
    ours = bpe()
    theirs = AutoTokenizer.from_pretrained(written(tmp_path, ours, public={"model_type": model_type}))
    assert [theirs.encode(text) for text in TEXT] == [ours.encode(text) for text in TEXT]


def test_the_config_has_ids_length_and_number_format(tmp_path):
    config = AutoConfig.from_pretrained(written(tmp_path, Tokenizer.of_bytes()))
    assert config.architectures == ["LlamaForCausalLM"] and str(config.dtype) == "torch.bfloat16"
    assert config.bos_token_id == config.eos_token_id == 256
    assert config.max_position_embeddings == 48 and config.vocab_size == 257


def test_the_longest_text_is_what_yarn_stretches_to():
    attention = {"kind": "gqa", "yarn": {"factor": 8.0, "original_length": 48}}
    stretched = TrainConfig.model_validate({"model": {"attention": attention}, "data": {"seq_len": 48}})
    assert longest_text(stretched) == 384 and longest_text(DENSE) == 48


@pytest.mark.parametrize("sample, wanted", [
    ({"temperature": 0.0}, {"do_sample": False}),
    ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}),
])  # fmt: skip
def test_text_is_generated_as_here(tmp_path, sample, wanted):
    content = generation_config(SampleConfig(**sample, max_tokens=7), 256)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    found = GenerationConfig.from_pretrained(tmp_path)
    found.validate(strict=True)
    assert {key: getattr(found, key) for key in wanted} == wanted
    assert found.max_new_tokens == 7 and found.eos_token_id == 256


def test_the_card_says_what_the_run_was(tmp_path):
    lines = [
        {"kind": "eval", "step": 5, "loss": 3.0},
        {"kind": "eval", "step": 9, "loss": 2.5},
        {"kind": "train", "step": 9},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{torn")
    card = model_card(Llama(), DENSE, 257, 9, tmp_path)
    assert "| held-out loss | 2.5000 nats per token |" in card and "LlamaForCausalLM" in card
    assert "2 layers of width 32" in card and "shakespeare" in card and "| training | 9 steps" in card
    assert "not recorded" in model_card(Llama(), DENSE, 257, 8, tmp_path)
    assert heldout_loss(tmp_path / "nowhere", 9) is None
    ours = model_card(NATIVE, DENSE, 257, 9, tmp_path)
    assert "vllm" not in ours and "model.init_from" in ours and "library_name" not in ours


def test_the_card_names_no_folder_of_the_machine(tmp_path):
    secret = TrainConfig.model_validate({"data": {"source": "text", "path": "/home/somebody/texts"}})
    assert "somebody" not in model_card(Llama(), secret, 257, 9, tmp_path)
