"""The Mixture-of-Experts layer: router, capacity plan, token exchange, experts, balance losses.

Legend of the shape suffixes in the whole project. A tensor of rank two or more ends in its dimensions: ``x_TD``.

=== ==================================================================================
B   sequences of a batch
S   positions of a sequence
T   tokens on this rank (B · S)
D   width of the residual stream
H   query heads
G   key and value heads
W   width of a head
E   experts of a layer, over all ranks
L   experts that this rank holds
K   choices (experts) per token
A   assignments: pairs of a token and an expert that takes it
C   capacity: assignments that an expert takes; of a classifier: classes
R   rows that arrived on this rank
N   rows sent, or rows in general
M   destinations per token, or rows of one expert: some number that only its function knows
F   hidden width of an expert (F2: gate and up side by side)
V   vocabulary
P   ranks of an expert-parallel group
=== ==================================================================================
"""

from moe_train.moe.layer import MoELayer
from moe_train.moe.record import LayerOutput

__all__ = ["LayerOutput", "MoELayer"]
