"""Prepare a corpus once: find its tokens where they lie already, or have them made."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from moe_train.config.schema import DataConfig, TokenizerConfig
from moe_train.data.encode import Encoder
from moe_train.data.files import exclusive, write_atomically
from moe_train.data.manifest import FORMAT_VERSION, MANIFEST_NAME, PreparedCorpus
from moe_train.data.progress import ShowProgress
from moe_train.data.sources import Identity, Source, open_source
from moe_train.data.sources.base import call_all
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError, Problem

RECIPE_NAME = "recipe.json"


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, output: Path | None, progress: ShowProgress
) -> PreparedCorpus:
    """Return the tokens of a corpus, making what is missing.

    A complete folder is used without reading the corpus. After an interruption the finished shards are kept. Of several
    processes one works, and the others wait for it.

    Args:
        data: the corpus.
        tokenizer: the tokenizer; a BPE is trained on the corpus.
        output: folder for the token files; None: one in data.cache_dir.
        progress: display of how far it is.

    Raises:
        DataError: text that is missing or unreadable; a folder that holds something else or cannot be written.
        ConfigError: data.source does not give text.
    """
    source = open_source(data)
    recipe = write_recipe(data, tokenizer, source)
    cache = Path(data.cache_dir).expanduser()
    folder = output or cache / "corpora" / key_of(recipe)
    make_once(folder, cache, recipe, lambda: Encoder(data, tokenizer, source, folder, progress).run())
    return PreparedCorpus.open(folder)


def make_once(folder: Path, cache: Path, recipe: bytes, make: Callable[[], None]) -> None:
    """Have a folder made, unless it is complete; of several processes one works, and the others wait for it.

    Args:
        folder: where to.
        cache: holds the locks, and the tokenizers that several folders share.
        recipe: all that the folder depends on.
        make: writes what is missing in it, the manifest last.

    Raises:
        DataError: a folder that holds something else or cannot be written; what ``make`` raises.
    """
    if is_complete(folder, recipe):
        return
    try:
        for needed in (folder, cache / "tokenizers", cache / "locks"):
            needed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set data.cache_dir and output to folders that you may write"
        raise DataError(Problem(str(error.filename), None, f"cannot be made: {error.strerror}", remedy)) from error
    with exclusive(cache / "locks" / f"{key_of(recipe)}.lock"):
        if not is_complete(folder, recipe):
            claim(folder, recipe)
            make()


def key_of(recipe: bytes) -> str:
    """Return the name of a recipe's folder in the cache, 16 hex digits."""
    return sha256(recipe).hexdigest()[:16]


def write_recipe(data: DataConfig, tokenizer: TokenizerConfig, source: Source) -> bytes:
    """Return all that the token files depend on, as JSON that a person can read."""
    source_identity, tokenizer_identity = call_all([source.identity, lambda: identify_tokenizer(tokenizer)])
    recipe = {
        "format_version": FORMAT_VERSION,
        "source": {data.source: source_identity},
        "heldout_fraction": data.heldout_fraction,
        "shard_bytes": data.shard_bytes,
        "tokenizer": tokenizer_identity,
    }
    return json.dumps(recipe, indent=2).encode()


def identify_tokenizer(config: TokenizerConfig) -> Identity:
    """Return what the tokenizer depends on besides the corpus."""
    if config.kind == "bpe":
        # Named only where they are true: so the folders of before they were there are still found.
        return {"kind": config.kind, "vocab_size": config.vocab_size} | dict.fromkeys(config.reading(), True)
    if config.kind == "file":
        return {"kind": config.kind, "fingerprint": Tokenizer.from_config_file(config).fingerprint}
    return {"kind": config.kind}


def is_complete(folder: Path, recipe: bytes) -> bool:
    """Tell whether ``folder`` holds all tokens of ``recipe``."""
    recipe_file = folder / RECIPE_NAME
    return (folder / MANIFEST_NAME).is_file() and recipe_file.is_file() and recipe_file.read_bytes() == recipe


def claim(folder: Path, recipe: bytes) -> None:
    """Mark ``folder`` as the place of ``recipe``, and remove what an interrupted write left there.

    Raises:
        DataError: it holds something else.
    """
    recipe_file = folder / RECIPE_NAME
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    if not recipe_file.is_file():
        if any(folder.iterdir()):
            rule = f"is not empty and has no {RECIPE_NAME}"
            raise DataError(Problem("output", folder, rule, "name an empty or a new folder"))
        write_atomically(recipe_file, recipe)
    elif recipe_file.read_bytes() != recipe:
        rule = f"holds tokens of another corpus or configuration (see {RECIPE_NAME} in it)"
        raise DataError(Problem("output", folder, rule, "name another folder, or delete this one"))
