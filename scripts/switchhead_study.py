"""Makes the tables and the picture of the switchhead study from run folders, finished ones only.

Usage: python scripts/switchhead_study.py RUN_FOLDER [RUN_FOLDER ...] [--output FOLDER]
"""

from __future__ import annotations

from functools import partial

from routing_study import write_and_print

from moe_train.observe.study.matched import SWITCHHEAD_STUDY, write_matched_study

if __name__ == "__main__":
    write_and_print(SWITCHHEAD_STUDY.name, partial(write_matched_study, SWITCHHEAD_STUDY))
