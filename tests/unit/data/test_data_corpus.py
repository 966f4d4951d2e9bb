import pytest

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.corpus import open_corpus
from moe_train.data.pack import prepare
from moe_train.data.progress import no_progress
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError

BYTES = TokenizerConfig(kind="bytes")


def lead(work):
    work()


def follow(work):
    """Another rank prepares."""


def test_leader_prepares_and_others_open(make_data, some_texts, monkeypatch):
    data = make_data(some_texts)
    leader = open_corpus(data, BYTES, lead)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *arguments: pytest.fail("encoded again"))
    follower = open_corpus(data, BYTES, follow)
    assert follower.fingerprint == leader.fingerprint
    assert follower.tokenizer.fingerprint == leader.tokenizer.fingerprint
    assert follower.train.num_tokens == leader.train.num_tokens
    assert (leader.train.num_documents, leader.heldout.num_documents) == (54, 6)


def test_leader_error_reaches_the_caller(make_data):
    with pytest.raises(DataError, match="no documents"):
        open_corpus(make_data([]), BYTES, lead)


def test_rank_without_the_cache_of_the_leader_prepares_its_own(make_data, some_texts, tmp_path):
    leader = open_corpus(make_data(some_texts), BYTES, lead)
    other_node = open_corpus(make_data(some_texts, cache_dir=str(tmp_path / "node1")), BYTES, follow)
    assert other_node.fingerprint == leader.fingerprint


def test_token_files_bring_their_tokenizer(make_data, some_texts, tmp_path):
    data = make_data(some_texts)
    prepared = prepare(data, TokenizerConfig(vocab_size=270), tmp_path / "tokens", no_progress)
    corpus = open_corpus(DataConfig(source="tokens", path=str(tmp_path / "tokens")), BYTES, lead)
    assert corpus.tokenizer.vocab_size == 270
    assert corpus.fingerprint == prepared.manifest.fingerprint
    assert corpus.train.num_documents == 54


def test_glob_of_token_folders(make_data, some_texts, tmp_path):
    for name, texts in (("a", some_texts), ("b", some_texts[:20])):
        prepare(make_data(texts), BYTES, tmp_path / f"tokens_{name}", no_progress)
    corpus = open_corpus(DataConfig(source="tokens", path=str(tmp_path / "tokens_*")), BYTES, lead)
    assert corpus.train.num_documents + corpus.heldout.num_documents == 80


def test_token_folders_of_two_tokenizers_are_refused(make_data, some_texts, tmp_path):
    for name, tokenizer in (("a", BYTES), ("b", TokenizerConfig(vocab_size=270))):
        prepare(make_data(some_texts), tokenizer, tmp_path / f"tokens_{name}", no_progress)
    with pytest.raises(DataError, match="its tokenizer is not that of"):
        open_corpus(DataConfig(source="tokens", path=str(tmp_path / "tokens_*")), BYTES, lead)


def test_missing_token_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist and matches no folder"):
        open_corpus(DataConfig(source="tokens", path=str(tmp_path / "none*")), BYTES, lead)
    with pytest.raises(DataError, match="it is not complete"):
        open_corpus(DataConfig(source="tokens", path=str(tmp_path)), BYTES, lead)
