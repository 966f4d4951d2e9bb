import json
from collections import Counter

import numpy as np
import pytest

import moe_train.data.labelled.prepare as prepare_room
from moe_train.config.schema import TokenizerConfig
from moe_train.config.task import SentimentTask
from moe_train.data.labelled.corpus import open_labelled
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError

BYTES = TokenizerConfig(kind="bytes")
BPE = TokenizerConfig(kind="bpe", vocab_size=290)


def rows_of(store, classes):
    return [(store.text(n), classes[store.labels_N[n]]) for n in range(store.num_texts)]


def sides(corpus):
    return rows_of(corpus.train, corpus.classes), rows_of(corpus.heldout, corpus.classes)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_every_text_is_on_one_side_with_its_class_and_its_tokens(open_rows, some_rows, tokenizer):
    corpus = open_rows(some_rows, tokenizer)
    train, heldout = sides(corpus)
    assert sorted(train + heldout) == sorted(some_rows)
    assert corpus.classes == ("bad", "good", "middling")
    assert Counter(label for _, label in heldout) == {"good": 10, "bad": 5, "middling": 3}
    for store in (corpus.train, corpus.heldout):
        for n in range(store.num_texts):
            assert corpus.tokenizer.decode(store.tokens(n).tolist()) == store.text(n)
            assert store.tokens(n).dtype == np.int64
            assert len(store.tokens(n)) == store.lengths_N[n]
            assert store.tokens(n, limit=3).tolist() == store.tokens(n)[:3].tolist()
            assert store.tokens(n, 1, 2).tolist() == store.tokens(n)[1:3].tolist()
        assert store.num_tokens == store.lengths_N.sum()
        assert store.num_bytes == sum(len(store.text(n).encode()) for n in range(store.num_texts))


def test_nothing_depends_on_the_order_of_the_rows(open_rows, some_rows):
    first, second = open_rows(some_rows, BPE), open_rows(some_rows[::-1], BPE, name="other.csv")
    assert sides(first) == sides(second)
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


def test_fingerprint_follows_texts_labels_split_and_tokenizer(open_rows, some_rows):
    relabelled = [(some_rows[0][0], "bad"), *some_rows[1:]]
    corpora = [
        open_rows(some_rows),
        open_rows(some_rows, split_seed=1),
        open_rows(some_rows, heldout_fraction=0.4),
        open_rows(some_rows, BPE),
        open_rows(some_rows, classes=("good", "bad", "middling")),
        open_rows(relabelled, name="relabelled.csv"),
        open_rows([*some_rows, ("one more", "good")], name="more.csv"),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)


def test_split_seed_chooses_other_texts_of_the_same_classes(open_rows, some_rows):
    first, second = sides(open_rows(some_rows))[1], sides(open_rows(some_rows, split_seed=1))[1]
    assert Counter(label for _, label in first) == Counter(label for _, label in second)
    assert set(first) != set(second)


def test_the_tokenizer_never_sees_a_heldout_text(make_labelled, some_rows, monkeypatch):
    seen = []
    train_bpe = Tokenizer.train_bpe

    def watched(texts, config):
        seen.extend(texts)
        return train_bpe(seen, config)

    monkeypatch.setattr(Tokenizer, "train_bpe", watched)
    corpus = open_labelled(make_labelled(some_rows), BPE, SentimentTask(), lambda work: work())
    train, heldout = sides(corpus)
    assert heldout and seen == [text for text, _ in train]


def test_copies_are_removed_before_the_split_and_said(open_rows, some_rows):
    copies = [(f"  {text}\n", "bad") for text, _ in some_rows[:6]]
    corpus = open_rows([*some_rows, *copies, ("   ", "good")])
    train, heldout = sides(corpus)
    assert sorted(text for text, _ in train + heldout) == sorted(text for text, _ in some_rows)
    assert corpus.account == (
        "53 texts to train on, 19 held out (26 bad, 34 good, 12 middling); "
        "6 copies removed, 6 texts had copies in several classes"
    )


def test_texts_without_tokens_are_left_out(open_rows, some_rows, tmp_path):
    Tokenizer.train_bpe(["abc"], TokenizerConfig(vocab_size=280)).save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "∅"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    chosen = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    corpus = open_rows([*some_rows, ("∅", "good"), ("∅∅", "bad")], chosen)
    assert (corpus.train.lengths_N > 0).all() and (corpus.heldout.lengths_N > 0).all()
    assert corpus.train.num_texts + corpus.heldout.num_texts == len(some_rows)
    assert corpus.account.endswith("2 texts without tokens left out")


def test_heldout_fraction_zero_keeps_all_for_training(open_rows, some_rows):
    corpus = open_rows(some_rows, heldout_fraction=0.0)
    assert (corpus.train.num_texts, corpus.heldout.num_texts, corpus.heldout.num_tokens) == (72, 0, 0)


def test_leader_prepares_and_others_open(make_labelled, some_rows, monkeypatch):
    data = make_labelled(some_rows)
    leader = open_labelled(data, BPE, SentimentTask(), lambda work: work())
    monkeypatch.setattr(prepare_room, "collect", lambda *_: pytest.fail("read again"))
    follower = open_labelled(data, BPE, SentimentTask(), lambda work: None)
    assert follower.fingerprint == leader.fingerprint
    assert follower.account == leader.account
    assert sides(follower) == sides(leader)


def test_classes_that_were_found_are_the_same_when_they_are_named(make_labelled, some_rows, tmp_path, monkeypatch):
    data, named = make_labelled(some_rows), SentimentTask(classes=("bad", "good", "middling"))
    found = open_labelled(data, BPE, SentimentTask(), lambda work: work())
    other_node = data.model_copy(update={"cache_dir": str(tmp_path / "other")})
    prepared_anew = open_labelled(other_node, BPE, named, lambda work: work())
    monkeypatch.setattr(prepare_room, "collect", lambda *_: pytest.fail("read again"))
    again = open_labelled(data, BPE, named, lambda work: work())
    assert found.fingerprint == again.fingerprint == prepared_anew.fingerprint
    assert sides(found) == sides(again) == sides(prepared_anew)


def test_an_interrupted_preparation_is_done_again(make_labelled, some_rows, monkeypatch):
    data = make_labelled(some_rows)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_room, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_labelled(data, BYTES, SentimentTask(), lambda work: work())
    corpus = open_labelled(data, BYTES, SentimentTask(), lambda work: work())
    assert corpus.train.num_texts == 54


@pytest.mark.parametrize("name", ["train.tokens.bin", "heldout.texts.bin", "train.index.npy"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_files_are_named(make_labelled, some_rows, tmp_path, name, how):
    data = make_labelled(some_rows)
    open_labelled(data, BYTES, SentimentTask(), lambda work: work())
    (path,) = (tmp_path / "cache" / "labelled").glob(f"*/{name}")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError, match=rf"{name}: .*delete .*labelled"):
        open_labelled(data, BYTES, SentimentTask(), lambda work: work())


def test_a_file_that_is_cut_while_it_is_used_is_an_error(open_rows, some_rows, tmp_path):
    store = open_rows(some_rows).train
    for kind, read in (("tokens", store.tokens), ("texts", store.text)):
        (path,) = (tmp_path / "cache" / "labelled").glob(f"*/train.{kind}.bin")
        path.write_bytes(path.read_bytes()[:-1])
        read(store.num_texts - 2)
        with pytest.raises(DataError, match="ends before its item"):
            read(store.num_texts - 1)
        path.unlink()
        with pytest.raises(DataError, match="cannot be read: No such file"):
            read(0)


def test_errors_reach_the_caller(open_rows):
    with pytest.raises(DataError, match=r"leaves nothing to train on of the 1 texts of class b"):
        open_rows([("x", "a"), ("y", "a"), ("z", "a"), ("w", "b")], heldout_fraction=0.5)
