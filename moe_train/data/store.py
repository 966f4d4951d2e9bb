"""The tokens of one split as one long sequence, read from the shards on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np

from moe_train.data.manifest import PreparedCorpus
from moe_train.data.shards import ShardFiles, Split, in_split, read_index, token_type
from moe_train.errors import DataError, Problem


@dataclass(frozen=True)
class Span:
    """A shard's part of a split.

    Attributes:
        files: its files.
        start: position of its first token in the split.
        num_tokens: its tokens.
        domains: labels of the numbers in its index.
    """

    files: ShardFiles
    start: int
    num_tokens: int
    domains: tuple[str, ...]


class TokenStore:
    """Virtual concatenation of the shards of one split, over one or more folders.

    Tokens are read at their offset and not mapped into memory: the page cache serves both, but a shard that is cut
    short under a map kills the process with SIGBUS, while here it is an error that names the file.

    Attributes:
        split: which split.
        num_tokens: its tokens, boundaries included.
        num_bytes: its bytes of UTF-8.
        num_documents: its documents.
        domains: labels of its documents.
    """

    def __init__(self, corpora: Sequence[PreparedCorpus], split: Split) -> None:
        totals = [corpus.manifest.splits[split] for corpus in corpora]
        self.split = split
        self.num_tokens = sum(total.tokens for total in totals)
        self.num_bytes = sum(total.bytes for total in totals)
        self.num_documents = sum(total.documents for total in totals)
        self.domains = tuple(dict.fromkeys(label for corpus in corpora for label in corpus.manifest.domains))
        self._corpora = corpora
        self._dtype = token_type(corpora[0].manifest.vocab_size)
        self._spans = list(spans(corpora, split))
        self._ends = np.cumsum([span.num_tokens for span in self._spans])
        # Bound to the store, not to the module: a folder may be deleted and made again in the life of a process.
        self._document_ends = lru_cache(maxsize=64)(partial(document_ends, split=split))
        self._check_sizes()

    def window(self, start: int, length: int) -> np.ndarray:
        """Return ``length`` tokens from position ``start`` on, int64 [length].

        Raises:
            DataError: a shard has vanished or shrunk since it was opened.
        """
        assert start >= 0 and start + length <= self.num_tokens, "a window must lie within the split"
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            span = self._span_at(start + filled)
            offset = start + filled - span.start
            count = min(length - filled, span.num_tokens - offset)
            tokens[filled : filled + count] = self._read(span, offset, count)
            filled += count
        return tokens

    def domain_at(self, position: int) -> str:
        """Return the domain label of the document that the token at ``position`` belongs to."""
        span = self._span_at(position)
        ends, numbers = self._document_ends(span.files)
        document = int(np.searchsorted(ends, position - span.start, side="right"))
        return span.domains[int(numbers[document])]

    @cached_property
    def unigram_counts(self) -> np.ndarray:
        """How often each token occurs in this split, int64 [V]."""
        files = [corpus.folder / corpus.manifest.unigrams[self.split] for corpus in self._corpora]
        counts: np.ndarray = np.sum([np.load(file, allow_pickle=False) for file in files], axis=0)
        return counts

    def unigram_entropy_bits_per_byte(self) -> float:
        """Return the loss of a model that knows only the token frequencies of this split, in bits per byte of text."""
        counts = self.unigram_counts[self.unigram_counts > 0]
        shares = counts / counts.sum()
        bits_per_token = -float(np.sum(shares * np.log2(shares)))
        return bits_per_token * self.num_tokens / self.num_bytes

    def _span_at(self, position: int) -> Span:
        assert 0 <= position < self.num_tokens, f"token {position} is outside the split"
        return self._spans[int(np.searchsorted(self._ends, position, side="right"))]

    def _read(self, span: Span, offset: int, count: int) -> np.ndarray:
        path = span.files.tokens(self.split)
        try:
            tokens = np.fromfile(path, dtype=self._dtype, count=count, offset=offset * self._dtype.itemsize)
        except OSError as error:
            raise DataError(damaged(span.files, self.split, f"cannot be read: {error.strerror}")) from error
        if len(tokens) < count:
            rule = f"ends before its token {offset + count} of {span.num_tokens}"
            raise DataError(damaged(span.files, self.split, rule))
        return tokens

    def _check_sizes(self) -> None:
        problems = []
        for span in self._spans:
            path = span.files.tokens(self.split)
            wanted = span.num_tokens * self._dtype.itemsize
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                problems.append(damaged(span.files, self.split, "is missing"))
            elif found != wanted:
                problems.append(damaged(span.files, self.split, f"has {found} bytes and should have {wanted}"))
        if problems:
            raise DataError(problems)


def spans(corpora: Sequence[PreparedCorpus], split: Split) -> Iterator[Span]:
    """Yield the shards of a split, those without tokens left out, each with its place in the split."""
    start = 0
    for corpus in corpora:
        for number, sizes in enumerate(corpus.manifest.shards):
            if tokens := sizes[split].tokens:
                yield Span(ShardFiles(corpus.folder, number), start, tokens, corpus.manifest.domains)
                start += tokens


def document_ends(files: ShardFiles, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return where the documents of a shard end, in tokens of the split, and their domain numbers, [documents]."""
    index = read_index(files)
    chosen = index[in_split(index, split)]
    return np.cumsum(chosen["tokens"]), chosen["domain"]


def damaged(files: ShardFiles, split: Split, rule: str) -> Problem:
    """Return the problem of a token file that is not as it was written."""
    remedy = f"delete {files.folder} and prepare the corpus again"
    return Problem(str(files.tokens(split)), None, rule, remedy)
