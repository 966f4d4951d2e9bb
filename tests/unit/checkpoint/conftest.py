"""Fixtures of the checkpoint tests."""

from checkpoint_samples import lone, state_at

__all__ = ["lone", "state_at"]
