"""Makes the tables and the picture of the graph study from run folders, finished ones only.

Usage: python scripts/graph_study.py RUN_FOLDER [RUN_FOLDER ...] [--output FOLDER]
"""

from __future__ import annotations

from routing_study import write_and_print

from moe_train.observe.study.graph import write_graph_study

if __name__ == "__main__":
    write_and_print("graph_study", write_graph_study)
