"""Which peers there are, what they need, and what to know about them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from moe_train.benchmark.allocators import allocators
from moe_train.benchmark.fleet import Program
from moe_train.benchmark.peers import deepspeed_layer, torchtitan_layer, transformers_layer, transformers_model
from moe_train.config.bench import Peer

EXTRA: Final = "pip install 'moe_train[bench]'"
"""What installs them."""


@dataclass(frozen=True)
class Entry:
    """One peer in one suite.

    Attributes:
        builder: ``module:function``.
        needs: packages to be imported, the peer itself first.
        about: how it differs.
        own: arguments of its own.
    """

    builder: str
    needs: tuple[str, ...]
    about: str
    own: Mapping[str, Any]

    @staticmethod
    def of(builder: str, needs: tuple[str, ...], about: str, **own: Any) -> Entry:
        """Return an entry."""
        return Entry(builder, needs, about, own)

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

    @property
    def note(self) -> str:
        """Version and differences, or what is missing."""
        if self.missing:
            return f"left out: {', '.join(self.missing)} not installed ({EXTRA})"
        return f"{self.needs[0]} {metadata.version(self.needs[0])}: {self.about}"


def _transformers(module: Any, experts: str) -> Entry:
    return Entry.of(f"{module.__name__}:build", module.NEEDS, module.ABOUT[experts], experts=experts)


LAYERS: Final[Mapping[Peer, Entry]] = {
    "transformers_eager": _transformers(transformers_layer, "eager"),
    "transformers_grouped_mm": _transformers(transformers_layer, "grouped_mm"),
    "deepspeed": Entry.of(f"{deepspeed_layer.__name__}:build", deepspeed_layer.NEEDS, deepspeed_layer.ABOUT),
    "torchtitan": Entry.of(f"{torchtitan_layer.__name__}:build", torchtitan_layer.NEEDS, torchtitan_layer.ABOUT),
}
MODELS: Final[Mapping[Peer, Entry]] = {
    "transformers_eager": _transformers(transformers_model, "eager"),
    "transformers_grouped_mm": _transformers(transformers_model, "grouped_mm"),
}


def programs(entries: Mapping[Peer, Entry], chosen: Iterable[Peer]) -> list[Program]:
    """Return the chosen peers as programs under every allocator; those that are not installed as notes only."""
    under = allocators()
    return [
        Program(
            peer, entries[peer].builder, entries[peer].own, {} if entries[peer].missing else under, entries[peer].note
        )
        for peer in chosen
    ]
