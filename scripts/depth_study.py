"""Makes the tables and the picture of the depth study from run folders, finished ones only.

Usage: python scripts/depth_study.py RUN_FOLDER [RUN_FOLDER ...] [--output FOLDER]
"""

from __future__ import annotations

from functools import partial

from routing_study import write_and_print

from moe_train.observe.study.matched import DEPTH_STUDY, write_matched_study

if __name__ == "__main__":
    write_and_print(DEPTH_STUDY.name, partial(write_matched_study, DEPTH_STUDY))
