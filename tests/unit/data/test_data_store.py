import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.config.schema import DataConfig, MixPart, TokenizerConfig
from moe_train.data.pack import prepare
from moe_train.data.progress import no_progress
from moe_train.data.store import TokenStore
from moe_train.errors import DataError


def all_tokens(texts):
    """Tokens of the texts under the tokenizer of bytes, whose boundary is 256."""
    return np.concatenate([[*text.encode(), 256] for text in texts])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(drawn=st.data())
def test_window_is_a_slice_across_shards(prepare_texts, some_texts, drawn):
    corpus = prepare_texts(some_texts, heldout_fraction=0.0)
    store, tokens = TokenStore([corpus], "train"), all_tokens(some_texts)
    start = drawn.draw(st.integers(0, len(tokens)))
    length = drawn.draw(st.integers(0, len(tokens) - start))
    window = store.window(start, length)
    assert window.dtype == np.int64
    assert np.array_equal(window, tokens[start : start + length])


def test_sizes(prepare_texts, some_texts):
    store = TokenStore([prepare_texts(some_texts, heldout_fraction=0.0)], "train")
    assert store.num_documents == 60
    assert store.num_bytes == sum(len(text.encode()) for text in some_texts)
    assert store.num_tokens == store.num_bytes + 60


def test_shards_without_heldout_documents(prepare_texts, some_texts):
    corpus = prepare_texts(some_texts, heldout_fraction=0.01)
    store = TokenStore([corpus], "heldout")
    assert store.num_documents == 1
    assert store.window(0, store.num_tokens)[-1] == 256


def test_outside_is_a_broken_invariant(prepare_texts, some_texts):
    store = TokenStore([prepare_texts(some_texts)], "train")
    with pytest.raises(AssertionError):
        store.window(store.num_tokens, 1)
    with pytest.raises(AssertionError):
        store.window(-1, 1)


def test_unigrams(prepare_texts):
    corpus = prepare_texts(["aab", "b"], heldout_fraction=0.0)
    store = TokenStore([corpus], "train")
    assert {token: int(n) for token, n in enumerate(store.unigram_counts) if n} == {97: 2, 98: 2, 256: 2}
    assert store.unigram_counts.shape == (257,)
    # three equally frequent tokens, 6 tokens for 4 bytes
    assert store.unigram_entropy_bits_per_byte() == pytest.approx(np.log2(3) * 6 / 4)


def test_domain_of_each_token(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(30)))
    parts = {name: MixPart(source="text", path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    data = DataConfig(source="mix", parts=parts, cache_dir=str(tmp_path), shard_bytes=50, heldout_fraction=0.2)
    corpus = prepare(data, TokenizerConfig(kind="bytes"), None, no_progress)
    for split in ("train", "heldout"):
        store = TokenStore([corpus], split)
        label = ""
        for position, token in enumerate(store.window(0, store.num_tokens)):
            label = label or chr(token)
            assert store.domain_at(position) == label
            if token == 256:
                label = ""
        assert store.domains == ("a", "b")


def test_two_folders_are_one_sequence(prepare_texts, some_texts):
    first = prepare_texts(some_texts, heldout_fraction=0.0)
    second = prepare_texts(["another text"], heldout_fraction=0.0)
    store = TokenStore([first, second], "train")
    tokens = all_tokens([*some_texts, "another text"])
    assert np.array_equal(store.window(0, store.num_tokens), tokens)
    assert np.array_equal(store.unigram_counts, np.bincount(tokens, minlength=257))


def test_damaged_shards_are_named_together(prepare_texts, some_texts):
    corpus = prepare_texts(some_texts)
    (corpus.folder / "shard_00001.train.bin").unlink()
    short = corpus.folder / "shard_00002.train.bin"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        TokenStore([corpus], "train")
    missing, truncated = map(str, caught.value.problems)
    assert "shard_00001.train.bin: is missing" in missing
    assert "shard_00002.train.bin: has" in truncated and "and should have" in truncated


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_shard_damaged_while_in_use_is_named(prepare_texts, some_texts, damage):
    corpus = prepare_texts(some_texts)
    store = TokenStore([corpus], "train")
    path = corpus.folder / "shard_00001.train.bin"
    path.unlink() if damage == "remove" else path.write_bytes(path.read_bytes()[:6])
    with pytest.raises(DataError, match=r"shard_00001\.train\.bin: (ends before its token|cannot be read)"):
        store.window(0, store.num_tokens)
