"""Mixture-of-Experts layers for a model of one's own: plain modules of one process that return (output, aux_loss).

They are made of the parts of the trainer's models. Weights are initialised at construction from torch's global
generator; on the meta device they have no values. The output has the shape and dtype of the input and no residual: a
token that no expert took is zeros. In evaluation aux_loss is zero.
"""

from moe_train.layers.deepseek import DeepSeekMoE
from moe_train.layers.graph import ExpertGraphConv, GraphCoupledMoE
from moe_train.layers.router import Choices, ExpertRouter
from moe_train.layers.sparse import MoELayer
from moe_train.layers.switch import SwitchFFN

__all__ = [
    "Choices",
    "DeepSeekMoE",
    "ExpertGraphConv",
    "ExpertRouter",
    "GraphCoupledMoE",
    "MoELayer",
    "SwitchFFN",
]
