"""Taking secrets out of text that is stored or shown: command lines, messages, configurations.

Only exact names count as secret, so that ``tokenizer.boundary_token`` and ``num_memory_tokens`` stay readable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
_SECRET = r"(?:[a-z0-9]+[_-])*(?:api[_-]?key|secret|secret[_-]key|password|passwd|(?:access|api|auth|hf|hub)[_-]token)"
_NAME = re.compile(rf"{_SECRET}|token", re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"(?<![a-z0-9_-])((?:--)?{_SECRET}(?:=|: *)|--token=)\S+", re.IGNORECASE)
# Of environment variables only the values are looked for, so that a wide net does no harm.
_VARIABLE = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# The published shapes of access tokens: Hugging Face, GitHub, OpenAI, Weights & Biases, AWS.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|wandb_v1_\w{20,}|AKIA[0-9A-Z]{16})"
)
_SHORTEST_VALUE = 8  # a shorter one would mask ordinary words


def redact(text: str) -> str:
    """Return ``text`` with secrets masked.

    Masked are the values of secret-named environment variables, ``name=value`` with a secret name, user and password in
    URLs, and strings of the shape of a known access token.
    """
    for value in _secret_environment_values():
        text = text.replace(value, MASK)
    text = _USERINFO.sub(MASK, text)
    text = _ASSIGNMENT.sub(rf"\1{MASK}", text)
    return _SHAPES.sub(MASK, text)


def redact_all(value: Any) -> Any:
    """Return ``value`` with every string in it redacted, at any depth of mappings and sequences."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: MASK if _is_secret(str(key)) and item else redact_all(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [redact_all(item) for item in value]
    return value


def redact_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line with secrets masked, also those that follow their option as a word of their own."""
    shown = []
    for position, argument in enumerate(arguments):
        previous = arguments[position - 1] if position else ""
        follows_secret = previous.startswith("--") and _is_secret(previous.removeprefix("--"))
        shown.append(MASK if follows_secret else redact(argument))
    return shown


def _is_secret(name: str) -> bool:
    """Return whether a key, option or variable called ``name`` holds a secret."""
    return _NAME.fullmatch(name) is not None


def _secret_environment_values() -> list[str]:
    """Return the values of the secret-named variables of this process, longest first."""
    values = [value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE]
    return sorted(values, key=len, reverse=True)
