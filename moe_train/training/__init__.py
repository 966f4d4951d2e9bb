"""Optimizer, schedule, step, loop and held-out evaluation."""
