"""The keys of running a trained model: what it remembers, what it leaves on disk."""

from __future__ import annotations

from pydantic import PositiveInt

from moe_train.config.base import Strict


class OffloadConfig(Strict):
    """Experts that stay on disk, and those of them that are kept in memory."""

    cached: PositiveInt = 8
    """Experts of each layer that are kept in memory, on each rank: those used most. One more is on its way through."""
    folder: str | None = None
    """Where experts lie one by one, on a disk that all ranks share; null: experts/ of the run. Written on first
    use, and anew for another checkpoint."""


class InferenceConfig(Strict):
    """How a trained model is run."""

    offload: OffloadConfig | None = None
    """Leaves routed experts on disk, for models larger than memory; null: everything is in memory."""
    remember: bool = True
    """Whether keys and values of earlier tokens are kept while a text is continued; false: each token reads the whole
    text again. So it does where the text is longer than data.seq_len, with experts that are whole blocks, and with
    capacity.eval_factor."""
