"""The graph study: do messages between experts pay, at equal FLOPs or equal parameters?"""

from moe_train.observe.study.graph.callback import GraphStudyCallback
from moe_train.observe.study.graph.result import write_graph_study

__all__ = ["GraphStudyCallback", "write_graph_study"]
