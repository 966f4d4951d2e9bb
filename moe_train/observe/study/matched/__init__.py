"""Studies of models that are matched in parameters or FLOPs: SwitchHead, Mixture-of-Depths."""

from moe_train.observe.study.matched.callback import DepthStudyCallback, SwitchHeadStudyCallback
from moe_train.observe.study.matched.plan import DEPTH_STUDY, SWITCHHEAD_STUDY, Plan
from moe_train.observe.study.matched.result import write_matched_study

__all__ = [
    "DEPTH_STUDY",
    "SWITCHHEAD_STUDY",
    "DepthStudyCallback",
    "Plan",
    "SwitchHeadStudyCallback",
    "write_matched_study",
]
