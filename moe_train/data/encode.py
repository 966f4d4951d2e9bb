"""The work behind prepare: survey the corpus, get its tokenizer, write its shards and their manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.files import exclusive, npy, write_atomically
from moe_train.data.manifest import TOKENIZER_NAME, Manifest, Totals
from moe_train.data.progress import ShowProgress
from moe_train.data.shards import INDEX, SPLITS, ShardFiles, Split, in_split, read_index, token_type, write_shard
from moe_train.data.sources import Document, Source
from moe_train.data.survey import Survey, survey
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError, Problem

BATCH_BYTES = 1024 * 1024
"""Text per call of the tokenizer: enough for its threads; the result takes about 80 bytes per byte of text."""
BPE_SAMPLE_BYTES = 256 * 1024 * 1024
"""A BPE is trained on a sample of about this much text: more changes few merges and takes hours."""


class Encoder:
    """One preparation of one folder; its caller holds the lock."""

    def __init__(
        self, data: DataConfig, tokenizer: TokenizerConfig, source: Source, folder: Path, progress: ShowProgress
    ) -> None:
        self.data = data
        self.tokenizer_config = tokenizer
        self.source = source
        self.folder = folder
        self.progress = progress

    def run(self) -> None:
        """Write everything that is missing in the folder; the manifest comes last.

        Raises:
            DataError: unreadable text, or a corpus that changes meanwhile.
        """
        found = survey(self.source, self.progress)
        heldout = found.heldout(self.data.heldout_fraction)
        tokenizer = self._tokenizer(found)
        tokenizer.save(self.folder / TOKENIZER_NAME)
        shards = tuple(self._shards(found, heldout, tokenizer))
        identity = [found.content, tokenizer.fingerprint, self.data.heldout_fraction]
        Manifest(
            fingerprint=sha256(json.dumps(identity).encode()).hexdigest(),
            tokenizer_fingerprint=tokenizer.fingerprint,
            boundary_token=tokenizer.boundary_token,
            vocab_size=tokenizer.vocab_size,
            domains=found.domains,
            splits={split: add(shard[split] for shard in shards) for split in SPLITS},
            unigrams={split: self._count_unigrams(split, len(shards), tokenizer.vocab_size) for split in SPLITS},
            shards=shards,
        ).write(self.folder)

    def _tokenizer(self, found: Survey) -> Tokenizer:
        if self.tokenizer_config.kind == "bytes":
            return Tokenizer.of_bytes()
        if self.tokenizer_config.kind == "file":
            return Tokenizer.from_config_file(self.tokenizer_config)
        cache = Path(self.data.cache_dir).expanduser()
        reading = "".join(f"{key}_" for key in self.tokenizer_config.reading())
        name = f"bpe_{reading}{self.tokenizer_config.vocab_size}_{found.content[:16]}"
        path = cache / "tokenizers" / f"{name}.json"
        with exclusive(cache / "locks" / f"{name}.lock"):
            if not path.is_file():
                Tokenizer.train_bpe(self._sample(found), self.tokenizer_config).save(path)
        return Tokenizer.load(path)

    def _sample(self, found: Survey) -> Iterator[str]:
        """Stream all texts, or of a large corpus those with the largest hashes: the smallest are held out."""
        share = min(1.0, BPE_SAMPLE_BYTES / found.total_bytes)
        sampled = found.hashes >= (1.0 - share) * 2.0**64
        with self.progress("training the tokenizer", int(found.total_bytes * share)) as advance:
            # Not strict: whether the corpus has changed since the survey is found out, and told, when it is encoded.
            for document, is_sampled in zip(self.source.documents(), sampled, strict=False):
                if is_sampled:
                    yield document.text
                    advance(len(document.text.encode()))

    def _shards(self, found: Survey, heldout: np.ndarray, tokenizer: Tokenizer) -> Iterator[dict[Split, Totals]]:
        """Write the shards that are not there yet; yield the size of each."""
        domains = {label: number for number, label in enumerate(found.domains)}
        done_documents = done_bytes = 0
        with self.progress("encoding", found.total_bytes) as advance:
            for number, documents in enumerate(group_by_bytes(self.source.documents(), self.data.shard_bytes)):
                first, done_documents = done_documents, done_documents + len(documents)
                if done_documents > found.num_documents:
                    break
                index = np.zeros(len(documents), dtype=INDEX)
                index["bytes"] = [len(document.text.encode()) for document in documents]
                index["domain"] = [domains.get(document.domain, -1) for document in documents]
                index["heldout"] = heldout[first:done_documents]
                files = ShardFiles(self.folder, number)
                yield measure(finish_shard(files, documents, index, tokenizer))
                done_bytes += int(index["bytes"].sum())
                advance(int(index["bytes"].sum()))
        if (done_documents, done_bytes) != (found.num_documents, found.total_bytes):
            rule = f"the corpus of {found.num_documents} documents has changed while it was prepared"
            raise DataError(Problem("data", None, rule, "run again when nothing writes to it"))

    def _count_unigrams(self, split: Split, num_shards: int, vocab_size: int) -> str:
        """Write how often each token occurs in a split; return the name of the file."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(num_shards):
            tokens = np.fromfile(ShardFiles(self.folder, number).tokens(split), dtype=token_type(vocab_size))
            counts += np.bincount(tokens, minlength=vocab_size)
        name = f"{split}.unigrams.npy"
        write_atomically(self.folder / name, npy(counts))
        return name


def finish_shard(
    files: ShardFiles, documents: Sequence[Document], index: np.ndarray, tokenizer: Tokenizer
) -> np.ndarray:
    """Write a shard, unless an earlier run has; return its index with the token counts.

    Args:
        files: where to.
        documents: what it holds.
        index: a row of INDEX per document, without the token counts.
        tokenizer: makes the tokens.
    """
    if files.index.is_file():
        finished = read_index(files)
        if all(np.array_equal(finished[field], index[field]) for field in ("bytes", "domain", "heldout")):
            return finished
    dtype = token_type(tokenizer.vocab_size)
    tokens = list(encode(documents, tokenizer, dtype))
    index["tokens"] = [len(document) for document in tokens]
    write_shard(files, tokens, index, dtype)
    return index


def encode(documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the tokens of each document with its boundary."""
    boundary = np.array([tokenizer.boundary_id], dtype=dtype)
    for batch in group_by_bytes(documents, BATCH_BYTES):
        for tokens in tokenizer.encode_batch([document.text for document in batch]):
            yield np.concatenate([tokens.astype(dtype), boundary])


def group_by_bytes(documents: Iterable[Document], limit_bytes: int) -> Iterator[list[Document]]:
    """Cut a stream of documents into runs; each ends with the document that brings it to ``limit_bytes`` of UTF-8."""
    group: list[Document] = []
    group_bytes = 0
    for document in documents:
        group.append(document)
        group_bytes += len(document.text.encode())
        if group_bytes >= limit_bytes:
            yield group
            group, group_bytes = [], 0
    if group:
        yield group


def measure(index: np.ndarray) -> dict[Split, Totals]:
    """Return the size of each split of a shard from its index."""
    parts = {split: index[in_split(index, split)] for split in SPLITS}
    return {
        split: Totals(tokens=int(part["tokens"].sum()), bytes=int(part["bytes"].sum()), documents=len(part))
        for split, part in parts.items()
    }


def add(totals: Iterable[Totals]) -> Totals:
    """Return the sum of sizes."""
    sizes = list(totals)
    return Totals(
        tokens=sum(size.tokens for size in sizes),
        bytes=sum(size.bytes for size in sizes),
        documents=sum(size.documents for size in sizes),
    )
