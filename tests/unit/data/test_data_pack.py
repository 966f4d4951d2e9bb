import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.manifest import Manifest, PreparedCorpus
from moe_train.data.pack import prepare
from moe_train.data.progress import no_progress
from moe_train.data.shards import ShardFiles, read_index, token_type
from moe_train.data.sources import Document
from moe_train.data.sources.text import TextFiles
from moe_train.data.store import TokenStore
from moe_train.data.survey import survey
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError

BYTES = TokenizerConfig(kind="bytes")
BPE = TokenizerConfig(kind="bpe", vocab_size=280)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(corpus, split):
    """Documents of a split, from its tokens."""
    store, tokenizer = TokenStore([corpus], split), corpus.tokenizer()
    tokens = store.window(0, store.num_tokens)
    ends = np.flatnonzero(tokens == tokenizer.boundary_id)
    return [tokenizer.decode(part[part != tokenizer.boundary_id].tolist()) for part in np.split(tokens, ends + 1)][:-1]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_every_document_is_in_one_split_in_order(prepare_texts, some_texts, tokenizer):
    corpus = prepare_texts(some_texts, tokenizer)
    train, heldout = decoded(corpus, "train"), decoded(corpus, "heldout")
    assert len(heldout) == 6
    assert sorted(train + heldout) == sorted(some_texts)
    assert train == [text for text in some_texts if text in set(train)]
    assert len(corpus.manifest.shards) > 3


def test_manifest_and_indexes_agree(prepare_texts, some_texts):
    corpus = prepare_texts(some_texts)
    shards = [ShardFiles(corpus.folder, number) for number in range(len(corpus.manifest.shards))]
    rows = np.concatenate([read_index(files) for files in shards])
    assert rows["bytes"].tolist() == [len(text.encode()) for text in some_texts]
    assert (rows["tokens"] == rows["bytes"] + 1).all()
    totals = corpus.manifest.splits
    assert totals["train"].documents + totals["heldout"].documents == len(some_texts)
    assert totals["heldout"].bytes == rows["bytes"][rows["heldout"]].sum()
    assert [files.tokens("train").stat().st_size for files in shards] == [
        2 * sizes["train"].tokens for sizes in corpus.manifest.shards
    ]


def test_type_of_tokens_follows_the_vocabulary():
    assert token_type(2**16) == np.uint16
    assert token_type(2**16 + 1) == np.uint32


@pytest.mark.slow
def test_large_vocabularies_take_four_bytes(prepare_texts, some_texts, tmp_path):
    tokenizer = Tokenizer.of_bytes()
    tokenizer._pipeline.add_tokens([f"<{number}>" for number in range(70_000)])
    tokenizer.save(tmp_path / "wide.json")
    corpus = prepare_texts([*some_texts, "<69999>"], TokenizerConfig(kind="file", path=str(tmp_path / "wide.json")))
    assert sorted(decoded(corpus, "train") + decoded(corpus, "heldout")) == sorted([*some_texts, "<69999>"])


def test_copies_are_on_one_side(prepare_texts):
    texts = [f"text {number % 20}" for number in range(100)]
    corpus = prepare_texts(texts, heldout_fraction=0.3)
    train, heldout = set(decoded(corpus, "train")), set(decoded(corpus, "heldout"))
    assert train and heldout and not train & heldout


def test_split_does_not_depend_on_order_or_shards(prepare_texts, some_texts):
    heldout = set(decoded(prepare_texts(some_texts), "heldout"))
    assert set(decoded(prepare_texts(some_texts[::-1], shard_bytes=999), "heldout")) == heldout


def test_one_document_cannot_be_split(prepare_texts):
    with pytest.raises(
        DataError, match=r"data\.heldout_fraction=0\.1: leaves nothing to train on: .* only 1 different"
    ):
        prepare_texts(["only one"])
    assert prepare_texts(["only one"], heldout_fraction=0.0).manifest.splits["heldout"].tokens == 0


def test_empty_corpus(prepare_texts):
    with pytest.raises(DataError, match="the corpus has no documents"):
        prepare_texts([])


def test_finished_corpus_is_not_read_again(make_data, some_texts, monkeypatch):
    data = make_data(some_texts)
    first = prepare(data, BPE, None, no_progress)
    monkeypatch.setattr(TextFiles, "documents", lambda self: pytest.fail("the corpus was read again"))
    assert prepare(data, BPE, None, no_progress) == first


def test_changed_corpus_is_prepared_anew(make_data, some_texts):
    first = prepare(make_data(some_texts), BYTES, None, no_progress)
    second = prepare(make_data([*some_texts, "one more"]), BYTES, None, no_progress)
    assert first.folder != second.folder
    assert first.manifest.fingerprint != second.manifest.fingerprint


def test_fingerprint_follows_content_split_and_tokenizer_only(make_data, some_texts):
    def fingerprint(tokenizer=BYTES, **settings):
        return prepare(make_data(some_texts, **settings), tokenizer, None, no_progress).manifest.fingerprint

    assert fingerprint(shard_bytes=5000) == fingerprint()
    assert len({fingerprint(), fingerprint(heldout_fraction=0.3), fingerprint(BPE)}) == 3


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_interrupted_preparation_goes_on(make_data, some_texts, tmp_path, monkeypatch, survivors):
    data = make_data(some_texts)
    whole = prepare(data, BPE, tmp_path / "whole", no_progress)
    encode_batch, encoded = Tokenizer.encode_batch, []

    def encode_until_killed(self, texts):
        # with shards this small, each is one batch
        if len(list((tmp_path / "cut").glob("*.index.npy"))) == survivors:
            raise Killed
        return encode_batch(self, texts)

    def encode_and_note(self, texts):
        encoded.extend(texts)
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_until_killed)
    with pytest.raises(Killed):
        prepare(data, BPE, tmp_path / "cut", no_progress)
    (tmp_path / "cut" / "shard_00002.train.bin.tmp").write_bytes(b"half")
    assert not (tmp_path / "cut" / "manifest.json").exists()

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_and_note)
    prepare(data, BPE, tmp_path / "cut", no_progress)
    finished = sum(len(read_index(ShardFiles(tmp_path / "cut", number))) for number in range(survivors))
    assert encoded == some_texts[finished:]
    assert contents(tmp_path / "cut") == contents(whole.folder)


def test_folder_without_manifest_is_not_used(prepare_texts, some_texts):
    folder = prepare_texts(some_texts).folder
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json: it is not complete"):
        PreparedCorpus.open(folder)


def test_manifest_of_another_format_is_refused(prepare_texts, some_texts):
    folder = prepare_texts(some_texts).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(DataError, match="not a manifest of format 1: format_version"):
        Manifest.read(folder)


def test_replaced_tokenizer_is_noticed(prepare_texts, some_texts):
    corpus = prepare_texts(some_texts)
    Tokenizer.train_bpe(["other"], TokenizerConfig(vocab_size=260)).save(corpus.folder / "tokenizer.json")
    with pytest.raises(DataError, match="not the tokenizer that made the tokens"):
        corpus.tokenizer()


def test_output_is_not_overwritten(make_data, some_texts, tmp_path):
    data = make_data(some_texts)
    out = tmp_path / "out"
    corpus = prepare(data, BYTES, out, no_progress)
    assert prepare(data, BYTES, out, no_progress) == corpus
    before = contents(out)
    with pytest.raises(DataError, match="holds tokens of another corpus"):
        prepare(data, BPE, out, no_progress)
    assert contents(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not empty"):
        prepare(data, BYTES, foreign, no_progress)


def test_cache_that_cannot_be_made(make_data, some_texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        prepare(make_data(some_texts, cache_dir=str(tmp_path / "file" / "cache")), BYTES, None, no_progress)


def test_full_disk_leaves_nothing_half(make_data, some_texts, tmp_path, monkeypatch):
    data = make_data(some_texts)
    replace = Path.replace

    def refuse_second_shard(self, target):
        if "shard_00001" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_second_shard)
    with pytest.raises(DataError, match=r"shard_00001\.train\.bin: cannot be written: No space left on device"):
        prepare(data, BYTES, tmp_path / "out", no_progress)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_text_and_tokenizer_problems_come_together(tmp_path):
    data = DataConfig(source="text", path=str(tmp_path / "none"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        prepare(data, TokenizerConfig(kind="file", path=str(tmp_path / "none.json")), None, no_progress)
    assert [problem.key for problem in caught.value.problems] == ["data.path", "tokenizer.path"]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize(
    "change", [lambda texts: texts[:-1], lambda texts: [*texts, "more"], lambda texts: ["", *texts[1:]]]
)
def test_corpus_that_changes_meanwhile_is_noticed(make_data, some_texts, monkeypatch, tokenizer, change):
    later = change(some_texts)
    passes = iter([some_texts, later, later])
    monkeypatch.setattr(TextFiles, "documents", lambda self: (Document(text, "text") for text in next(passes)))
    with pytest.raises(DataError, match="60 documents has changed while it was prepared"):
        prepare(make_data(some_texts), tokenizer, None, no_progress)


def test_capitals_are_part_of_what_was_prepared(make_data, some_texts):
    data, lower = make_data(some_texts), TokenizerConfig(kind="bpe", vocab_size=280, lowercase=True)
    as_written, small = (prepare(data, chosen, None, no_progress) for chosen in (BPE, lower))
    assert as_written.folder != small.folder
    assert small.tokenizer().encode("A") == small.tokenizer().encode("a") != as_written.tokenizer().encode("A")


def test_a_space_before_texts_is_part_of_what_was_prepared(make_data, some_texts):
    data, spaced = make_data(some_texts), TokenizerConfig(kind="bpe", vocab_size=280, prefix_space=True)
    as_written, before = (prepare(data, chosen, None, no_progress) for chosen in (BPE, spaced))
    assert as_written.folder != before.folder
    assert before.tokenizer().encode("A") == before.tokenizer().encode(" A") == as_written.tokenizer().encode(" A")


def test_bpe_is_trained_once_per_corpus(make_data, some_texts, monkeypatch):
    prepare(make_data(some_texts), BPE, None, no_progress)
    monkeypatch.setattr(Tokenizer, "train_bpe", lambda *arguments: pytest.fail("trained again"))
    prepare(make_data(some_texts, shard_bytes=333), BPE, None, no_progress)


def test_bpe_of_a_large_corpus_sees_a_sample_without_heldout_documents(make_data, some_texts, monkeypatch):
    monkeypatch.setattr("moe_train.data.encode.BPE_SAMPLE_BYTES", 800)
    train_bpe, seen = Tokenizer.train_bpe, []
    monkeypatch.setattr(Tokenizer, "train_bpe", lambda texts, config: train_bpe(seen.extend(texts) or seen, config))
    corpus = prepare(make_data(some_texts), BPE, None, no_progress)
    assert 200 < sum(len(text.encode()) for text in seen) < 1600
    assert not set(seen) & set(decoded(corpus, "heldout"))


def test_survey_content_depends_on_order_and_label():
    class Fixed:
        def __init__(self, *documents):
            self.list = documents

        def documents(self):
            return iter(self.list)

        def identity(self):
            return {}

    a, b, other = Document("a", "x"), Document("b", "x"), Document("a", "y")
    found = [survey(Fixed(*documents), no_progress).content for documents in ((a, b), (b, a), (other, b), (a, b))]
    assert len(set(found)) == 3 and found[0] == found[3]


def prepare_in_child(data, barrier):
    barrier.wait()
    prepare(data, BPE, None, no_progress)


def test_two_processes_at_once(make_data, some_texts, tmp_path):
    texts = some_texts * 20
    data = make_data(texts)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    children = [context.Process(target=prepare_in_child, args=(data, barrier)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    (folder,) = (tmp_path / "cache" / "corpora").iterdir()
    alone = prepare(data, BPE, tmp_path / "alone", no_progress)
    assert contents(folder) == contents(alone.folder)


@pytest.mark.slow
def test_memory_stays_under_a_gigabyte(tmp_path):
    code = f"""
from pathlib import Path
from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.pack import prepare
from moe_train.data.progress import no_progress
prepare(DataConfig(source="imdb", cache_dir={str(tmp_path)!r}), TokenizerConfig(vocab_size=8192), None, no_progress)
# Not ru_maxrss, in which the kernel counts the process that forked this one.
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(child.stdout) * 1024 < 10**9
