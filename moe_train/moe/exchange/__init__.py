"""How tokens reach their experts and come home: the only thing that expert parallelism changes in a layer.

An exchange sends a layer's tokens on a `Transit`, whole or cut into parts, each of which makes a `Journey` of no leg,
one or two, out and back:

- `LocalExchange`: no leg, the experts are here.
- `AllToAllExchange`: once to each rank that holds one of the token's experts, with expert ids and weights; the experts
  there add up their part of its sum, one row per token and rank comes back, and the parts are added at home.
- `HierarchicalExchange`: once to each node, and on from there to its ranks; the parts are added up in the node first.
- `GatherExchange`: to every rank; nobody has to know how many come.
- `PaddedExchange`: once to each expert, in buffers of fixed size; the host waits for nothing.
"""

from moe_train.moe.exchange.allgather import GatherExchange
from moe_train.moe.exchange.alltoall import AllToAllExchange
from moe_train.moe.exchange.choose import Choice, choose, exchange_for
from moe_train.moe.exchange.hierarchical import HierarchicalExchange
from moe_train.moe.exchange.journey import Arrived, Exchange, Journey, Transit
from moe_train.moe.exchange.local import LocalExchange
from moe_train.moe.exchange.padded import PaddedExchange

__all__ = [
    "AllToAllExchange",
    "Arrived",
    "Choice",
    "Exchange",
    "GatherExchange",
    "HierarchicalExchange",
    "Journey",
    "LocalExchange",
    "PaddedExchange",
    "Transit",
    "choose",
    "exchange_for",
]
