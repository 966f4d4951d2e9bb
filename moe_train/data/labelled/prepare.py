"""Prepare labelled texts once: find their tokens where they lie already, or make them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.config.task import SentimentTask
from moe_train.data.files import npy, write_atomically
from moe_train.data.labelled.collect import Collection, collect
from moe_train.data.labelled.manifest import INDEX, LABELLED_FORMAT, LabelledManifest, LabelledTotals, PreparedTexts
from moe_train.data.labelled.sources import LabelledSource, open_labelled_source
from moe_train.data.labelled.split import split_order, stratified
from moe_train.data.manifest import TOKENIZER_NAME
from moe_train.data.pack import identify_tokenizer, is_complete, key_of, make_once
from moe_train.data.progress import Advance, ShowProgress
from moe_train.data.shards import SPLITS, Split, token_type
from moe_train.data.sources.base import call_all
from moe_train.data.tokenizer import Tokenizer

TEXTS_PER_CALL = 256
"""Texts per call of the tokenizer: enough for its threads; the result takes about 80 bytes per byte of text."""


def prepare_labelled(
    data: DataConfig, tokenizer: TokenizerConfig, task: SentimentTask, progress: ShowProgress
) -> PreparedTexts:
    """Return the tokens of labelled texts, making what is missing in data.cache_dir.

    A complete folder is used without reading the texts. While a folder is made, all texts are held in memory. Of
    several processes one works, and the others wait for it.

    Args:
        data: the texts.
        tokenizer: the tokenizer; a BPE is trained on the training texts, never on those that are held out.
        task: names the classes.
        progress: display of how far it is.

    Raises:
        DataError: texts that are missing, unreadable or without classes; a cache that cannot be written.
    """
    source = open_labelled_source(data)
    if (known := with_classes_found(data, tokenizer, task, source)) is not None:
        return known
    recipe = write_labelled_recipe(data, tokenizer, task, source)
    cache = Path(data.cache_dir).expanduser()
    folder = labelled_folder(data, recipe)
    make_once(folder, cache, recipe, lambda: LabelledEncoder(data, tokenizer, task, source, folder, progress).run())
    return PreparedTexts(folder, LabelledManifest.read(folder))


def with_classes_found(
    data: DataConfig, tokenizer: TokenizerConfig, task: SentimentTask, source: LabelledSource
) -> PreparedTexts | None:
    """Return what was prepared without names of classes, if it found those that ``task`` names, in their order.

    A run looks for its classes once, and names them in its config.yaml: whoever goes on from there has the same texts.
    """
    if task.classes is None:
        return None
    recipe = write_labelled_recipe(data, tokenizer, SentimentTask(), source)
    folder = labelled_folder(data, recipe)
    if not is_complete(folder, recipe):
        return None
    prepared = PreparedTexts(folder, LabelledManifest.read(folder))
    return prepared if prepared.manifest.classes == task.classes else None


def labelled_folder(data: DataConfig, recipe: bytes) -> Path:
    """Return where the cache has, or will have, the labelled tokens of a recipe."""
    return Path(data.cache_dir).expanduser() / "labelled" / key_of(recipe)


def write_labelled_recipe(
    data: DataConfig, tokenizer: TokenizerConfig, task: SentimentTask, source: LabelledSource
) -> bytes:
    """Return all that the files depend on, as JSON that a person can read."""
    source_identity, tokenizer_identity = call_all([source.identity, lambda: identify_tokenizer(tokenizer)])
    recipe = {
        "labelled_format": LABELLED_FORMAT,
        "source": {data.source: source_identity},
        "classes": task.classes,
        "heldout_fraction": data.heldout_fraction,
        "split_seed": data.split_seed,
        "tokenizer": tokenizer_identity,
    }
    return json.dumps(recipe, indent=2).encode()


class LabelledEncoder:
    """One preparation of one folder; its caller holds the lock."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerConfig,
        task: SentimentTask,
        source: LabelledSource,
        folder: Path,
        progress: ShowProgress,
    ) -> None:
        self.data = data
        self.tokenizer_config = tokenizer
        self.task = task
        self.source = source
        self.folder = folder
        self.progress = progress

    def run(self) -> None:
        """Write the folder; the manifest comes last.

        Raises:
            DataError: unreadable texts, labels that are no classes, a class without a text to train on.
        """
        found = collect(self.source, self.task.classes, self.progress)
        order_N = split_order(found.texts, self.data.split_seed)
        heldout_N = stratified(found.labels_N[order_N], found.classes, self.data.heldout_fraction)
        sides: dict[Split, np.ndarray] = {"train": order_N[~heldout_N], "heldout": order_N[heldout_N]}
        tokenizer = self._tokenizer([found.texts[n] for n in sides["train"].tolist()])
        tokenizer.save(self.folder / TOKENIZER_NAME)
        indexes = {split: self._write(split, found, sides[split], tokenizer) for split in SPLITS}
        LabelledManifest(
            fingerprint=fingerprint_of(found, sides, tokenizer),
            tokenizer_fingerprint=tokenizer.fingerprint,
            boundary_token=tokenizer.boundary_token,
            vocab_size=tokenizer.vocab_size,
            classes=found.classes,
            splits={split: measure(index, len(found.classes)) for split, index in indexes.items()},
            examples=found.examples,
            copies=found.examples - len(found.texts),
            conflicts=found.conflicts,
            tokenless=len(found.texts) - sum(map(len, indexes.values())),
        ).write(self.folder)

    def _tokenizer(self, texts: Sequence[str]) -> Tokenizer:
        if self.tokenizer_config.kind == "bytes":
            return Tokenizer.of_bytes()
        if self.tokenizer_config.kind == "file":
            return Tokenizer.from_config_file(self.tokenizer_config)
        with self.progress("training the tokenizer", byte_length(texts)) as advance:
            return Tokenizer.train_bpe(told(texts, advance), self.tokenizer_config)

    def _write(self, split: Split, found: Collection, rows_N: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Write the files of a split, texts without tokens left out; return its index."""
        texts = [found.texts[n] for n in rows_N.tolist()]
        with self.progress(f"encoding the {split} texts", byte_length(texts)) as advance:
            tokens = [ids for part in parts(texts) for ids in tokenizer.encode_batch(list(told(part, advance)))]
        kept = [place for place, ids in enumerate(tokens) if len(ids)]
        encoded = [texts[place].encode() for place in kept]
        index = np.zeros(len(kept), dtype=INDEX)
        index["tokens"] = [len(tokens[place]) for place in kept]
        index["bytes"] = [len(text) for text in encoded]
        index["label"] = found.labels_N[rows_N][kept]
        dtype = token_type(tokenizer.vocab_size)
        contents = b"".join(tokens[place].astype(dtype).tobytes() for place in kept)
        write_atomically(self.folder / f"{split}.tokens.bin", contents)
        write_atomically(self.folder / f"{split}.texts.bin", b"".join(encoded))
        write_atomically(self.folder / f"{split}.index.npy", npy(index))
        return index


def fingerprint_of(found: Collection, sides: dict[Split, np.ndarray], tokenizer: Tokenizer) -> str:
    """Return 64 hex digits that are equal when texts, classes, split and tokenizer are; the rows' order is left out."""
    content = sha256(json.dumps([found.classes, tokenizer.fingerprint]).encode())
    for split in SPLITS:
        for n in sides[split].tolist():
            content.update(sha256(found.texts[n].encode()).digest() + int(found.labels_N[n]).to_bytes(8, "big"))
        content.update(split.encode())
    return content.hexdigest()


def measure(index: np.ndarray, num_classes: int) -> LabelledTotals:
    """Return the size of a split from its index."""
    by_class = np.bincount(index["label"], minlength=num_classes).tolist()
    return LabelledTotals(tokens=int(index["tokens"].sum()), bytes=int(index["bytes"].sum()), by_class=tuple(by_class))


def parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts into runs for one call of the tokenizer each."""
    return (texts[start : start + TEXTS_PER_CALL] for start in range(0, len(texts), TEXTS_PER_CALL))


def told(texts: Sequence[str], advance: Advance) -> Iterator[str]:
    """Yield texts, and tell the display of their bytes."""
    for text in texts:
        yield text
        advance(len(text.encode()))


def byte_length(texts: Sequence[str]) -> int:
    """Return the bytes of UTF-8 of texts."""
    return sum(len(text.encode()) for text in texts)
