"""What a family of public models is: a config.json and a table of tensors, translated in both directions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_train.config.model import ModelConfig
from moe_train.errors import Problem
from moe_train.interop.parts import Parts


@dataclass(frozen=True)
class Architecture:
    """A public config.json in our words.

    Attributes:
        model: plain mapping for `ModelConfig`: keys of the architecture only; `vocab_size` is always stated.
        problems: what this project does not cover; empty: the model computes what the public class does.
    """

    model: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)


class Family(Protocol):
    """The tables between one class of public models and ours."""

    @property
    def model_type(self) -> str:
        """Value of `model_type` in config.json."""

    @property
    def class_name(self) -> str:
        """Name of the class of causal language models in transformers."""

    def architecture(self, public: Mapping[str, Any]) -> Architecture:
        """Translate a config.json."""

    def refusals(self, model: ModelConfig) -> list[str]:
        """Return why this class cannot express a model, a reason each; empty: it can."""

    def public_config(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """Return the config.json of a model that is not refused, without token ids, dtype and longest text."""

    def parts(self, model: ModelConfig, vocab_size: int) -> Parts:
        """Return the pieces that each of our tensors is made of, for a model that is not refused."""

    def constants(self, model: ModelConfig) -> Mapping[str, tuple[tuple[int, ...], float]]:
        """Return shape and value of public tensors that the class has and the model does not need, by name."""

    def depth_present(self, model: ModelConfig, names: Collection[str]) -> int:
        """Return how many of the model's modules for multi-token prediction are among a folder's tensors."""


class Reading:
    """A config.json that is asked key by key; what is wrong with it is collected instead of raised.

    Args:
        public: what config.json holds.
        defaults: what the public class takes where config.json says nothing.
        aliases: other names of keys, by the name that is asked for.
    """

    def __init__(
        self, public: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None
    ) -> None:
        self.public = public
        self.defaults = defaults
        self.aliases = aliases or {}
        self.problems: list[Problem] = []

    def get(self, key: str) -> Any:
        """Return the value of a key, by any of its names, or its default; a stated null is None."""
        for name in (key, self.aliases.get(key, key)):
            if name in self.public:
                return self.public[name]
        return self.defaults.get(key)

    def refuse(self, key: str, rule: str, remedy: str, value: Any = None) -> None:
        """Collect a problem with a key; value: what stood there, when it is not that of the key alone."""
        self.problems.append(Problem(f"config.json {key}", self.get(key) if value is None else value, rule, remedy))

    def integer(self, key: str, least: int = 1) -> int:
        """Return an integer; where there is none, a stand-in, and a problem."""
        value = self.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self.refuse(key, f"must be an integer of at least {least}", "correct it")
        return max(1, least)

    def count(self, key: str) -> int:
        """Return an integer; null is 0."""
        return 0 if self.get(key) is None else self.integer(key, least=0)

    def number(self, key: str) -> float:
        """Return a number; where there is none, a stand-in, and a problem."""
        value = self.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        self.refuse(key, "must be a number", "correct it")
        return 1.0

    def flag(self, key: str) -> bool:
        """Return a truth value; null is false, as in the public classes."""
        return bool(self.get(key))

    def expect(self, key: str, allowed: Collection[Any], why: str) -> None:
        """Collect a problem if a key is stated and has another value than those allowed (null always is)."""
        value = self.get(key)
        if value is None or value in allowed:
            return
        choices = " or ".join(str(choice) for choice in allowed)
        self.refuse(key, why, f"choose a model with {key}={choices}" if choices else "choose a model without it")
