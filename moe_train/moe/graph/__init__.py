"""Dense graph-coupled layers: every expert sees every token, and the experts exchange messages through a learned graph.

The way of a token: ``layer`` brings it to all experts and their results home, ``conv`` lets the experts exchange
messages, ``coupling`` stacks such layers and pools the experts, ``record`` says how different the experts are.
"""

from moe_train.moe.graph.layer import GraphLayer

__all__ = ["GraphLayer"]
