"""Scaling laws: many runs of different sizes, lengths, experts and granularity, and one law for the loss of them all.

Symbols: ``N`` active parameters without embeddings and routers, ``D`` tokens of training, ``E`` experts' weights stored
over those that a token uses (1: dense), ``G`` granularity, the experts that a token uses together, each 1/G as wide.
"""

from moe_train.observe.study.scaling.result import write_scaling_report

__all__ = ["write_scaling_report"]
