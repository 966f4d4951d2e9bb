from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from moe_train.config.schema import TokenizerConfig
from moe_train.data.tokenizer import BOUNDARY_TOKEN, Tokenizer, byte_characters
from moe_train.errors import DataError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Ünïcödé  \n\t spaces"] * 20
BPE = Tokenizer.train_bpe(TEXTS, TokenizerConfig(vocab_size=280))
BYTES = Tokenizer.of_bytes()
BOTH = pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])


@BOTH
@settings(deadline=None)
@given(text=st.text() | st.sampled_from([BOUNDARY_TOKEN, f"a{BOUNDARY_TOKEN}b", "</s>", "\x00\r\n  \ufeff"]))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.boundary_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert np.array_equal(tokenizer.encode_batch([text])[0], ids)


def test_lower_case_makes_one_word_of_all_ways_to_write_it(tmp_path):
    lower = Tokenizer.train_bpe(TEXTS, TokenizerConfig(vocab_size=280, lowercase=True))
    assert lower.encode("The CAT") == lower.encode("the cat") == BPE.encode("the cat")
    assert lower.decode(lower.encode("Ünïcödé, THE")) == "ünïcödé, the"
    lower.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode("The CAT") == lower.encode("the cat")
    assert again.fingerprint == lower.fingerprint != BPE.fingerprint


def test_with_a_space_before_it_the_first_word_is_as_elsewhere(tmp_path):
    spaced = Tokenizer.train_bpe(TEXTS, TokenizerConfig(vocab_size=280, prefix_space=True))
    first, *rest = spaced.encode("the the")
    assert rest == [first] and spaced.encode(" the") == [first]
    assert spaced.decode(spaced.encode("the cat")) == " the cat"
    spaced.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("the cat") == spaced.encode("the cat")


def test_bytes_are_their_values():
    assert BYTES.encode("Aé\n") == list("Aé\n".encode())
    assert (BYTES.vocab_size, BYTES.boundary_id) == (257, 256)
    assert len(set(byte_characters())) == 256


def test_bpe_joins_bytes_up_to_the_vocabulary():
    assert BPE.vocab_size == 280
    assert len(BPE.encode("the cat")) < len("the cat")


def test_bpe_training_is_deterministic():
    assert Tokenizer.train_bpe(iter(TEXTS), TokenizerConfig(vocab_size=280)).fingerprint == BPE.fingerprint
    assert Tokenizer.train_bpe(TEXTS, TokenizerConfig(vocab_size=270)).fingerprint != BPE.fingerprint


@BOTH
def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the cat é") == tokenizer.encode("the cat é")
    assert loaded.boundary_id == tokenizer.boundary_id


def test_boundary_has_no_text():
    assert BPE.decode([*BPE.encode("one"), BPE.boundary_id]) == "one"


def word_tokenizer(path: Path, special: list[str]) -> Path:
    pipeline = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    pipeline.add_special_tokens(special)
    pipeline.enable_truncation(1)
    pipeline.enable_padding(length=9)
    pipeline.save(str(path))
    return path


def test_boundary_of_a_foreign_tokenizer(tmp_path):
    path = word_tokenizer(tmp_path / "t.json", ["[SEP]", "</s>", "<end>"])
    assert Tokenizer.load(path).boundary_token == "</s>"
    chosen = Tokenizer.load(path, "<end>")
    assert (chosen.boundary_id, chosen.vocab_size) == (4, 5)
    assert chosen.fingerprint != Tokenizer.load(path).fingerprint


def test_missing_boundary_lists_what_there_is(tmp_path):
    path = word_tokenizer(tmp_path / "t.json", ["<pad>", "<mask>"])
    with pytest.raises(DataError, match="special tokens are: <pad>, <mask>"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match="has no token <end>"):
        Tokenizer.load(path, "<end>")


def test_truncation_and_padding_of_a_foreign_tokenizer_are_off(tmp_path):
    path = tmp_path / "t.json"
    foreign = tokenizers.Tokenizer.from_str(BPE._pipeline.to_str())
    foreign.enable_truncation(2)
    foreign.enable_padding(length=50)
    foreign.save(str(path))
    assert Tokenizer.load(path).encode("the cat sat on the mat") == BPE.encode("the cat sat on the mat")


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
