"""Text to tokens and back: a byte-level BPE trained on the corpus, single bytes, or any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moe_train.config.schema import TokenizerConfig
from moe_train.data.files import write_atomically
from moe_train.errors import DataError, Problem

BOUNDARY_TOKEN = "<|endoftext|>"
"""The token that ends a document in the tokenizers that we make; the name is GPT-2's."""
KNOWN_BOUNDARY_TOKENS = (BOUNDARY_TOKEN, "</s>", "<eos>", "[SEP]")
"""Looked for in this order in the tokenizers of others."""


class Tokenizer:
    """A ``tokenizers`` pipeline for plain text: no truncation, no padding, no token added at either end.

    The names of special tokens in a text are text: no document can forge a boundary.

    Attributes:
        vocab_size: one more than the largest token id.
        boundary_token: name of the token that ends a document.
        boundary_id: its id.
        fingerprint: 64 hex digits; equal for equal tokenizers.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, boundary_token: str) -> None:
        pipeline.no_truncation()
        pipeline.no_padding()
        pipeline.encode_special_tokens = True
        boundary_id = pipeline.token_to_id(boundary_token)
        assert boundary_id is not None, f"the tokenizer has no token {boundary_token}"
        self._pipeline = pipeline
        self.vocab_size = max(pipeline.get_vocab(with_added_tokens=True).values()) + 1
        self.boundary_token = boundary_token
        self.boundary_id = boundary_id
        canonical = json.dumps([json.loads(pipeline.to_str()), boundary_id], sort_keys=True)
        self.fingerprint = sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path, boundary_token: str | None = None) -> Tokenizer:
        """Read a tokenizer.json.

        Args:
            path: the file.
            boundary_token: name of the token that ends a document; None: the first known one.

        Raises:
            DataError: no such file, no tokenizer in it, or no such token in the tokenizer.
        """
        if not path.is_file():
            raise DataError(Problem("tokenizer.path", path, "is not a file", "give the path of a tokenizer.json"))
        try:
            pipeline = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception for every fault of the file
            rule = f"is not a tokenizer.json: {error}"
            raise DataError(Problem("tokenizer.path", path, rule, "save it again from the library")) from error
        candidates = KNOWN_BOUNDARY_TOKENS if boundary_token is None else (boundary_token,)
        found = next((token for token in candidates if pipeline.token_to_id(token) is not None), None)
        if found is None:
            special = ", ".join(token.content for token in pipeline.get_added_tokens_decoder().values())
            rule = f"{path} has no token {' or '.join(candidates)}; its special tokens are: {special or 'none'}"
            remedy = "set it to the token that ends a document"
            raise DataError(Problem("tokenizer.boundary_token", boundary_token, rule, remedy))
        return cls(pipeline, found)

    @classmethod
    def from_config_file(cls, config: TokenizerConfig) -> Tokenizer:
        """Read the file that the configuration names (kind ``file``).

        Raises:
            DataError: as load.
        """
        assert config.path is not None, "the rules of the configuration require tokenizer.path for kind=file"
        return cls.load(Path(config.path).expanduser(), config.boundary_token)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Return the tokenizer whose tokens 0 to 255 are the byte values; 256 is the boundary."""
        vocab = {character: byte for byte, character in enumerate(byte_characters())}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False), BOUNDARY_TOKEN)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
        """Train a byte-level BPE (Radford et al. 2019, section 2.2) on a stream of texts.

        Args:
            texts: read once, never held together.
            config: how many tokens, the boundary included (a small corpus may give fewer), and what texts are read as.
        """
        pipeline = _byte_level(models.BPE(), use_regex=True, prefix_space=config.prefix_space)
        if config.lowercase:
            pipeline.normalizer = normalizers.Lowercase()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[BOUNDARY_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pipeline.train_from_iterator(iter(texts), trainer)
        return cls(pipeline, BOUNDARY_TOKEN)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without a boundary."""
        return list(self._pipeline.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, uint32, without boundaries; the texts are encoded in parallel threads."""
        encodings = self._pipeline.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; boundaries and other special tokens have none."""
        return str(self._pipeline.decode(ids, skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, whole or not at all."""
        write_atomically(path, self._pipeline.to_str(pretty=True).encode())


def _byte_level(model: models.Model, use_regex: bool, prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Return a pipeline over bytes, with the boundary token; lossless but for a space before the text.

    Args:
        model: how bytes are joined to tokens.
        use_regex: keep tokens within words, numbers and runs of signs, as GPT-2 does.
        prefix_space: put one before a text that begins with none.
    """
    pipeline = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=use_regex)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([BOUNDARY_TOKEN])
    return pipeline


def byte_characters() -> list[str]:
    """Return the character that stands for each of the 256 bytes in byte-level tokenizers (GPT-2, encoder.py).

    Printable bytes stand for themselves, the others follow from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
