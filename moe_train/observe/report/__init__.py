"""The report of a run: one page that opens anywhere, drawn from the files in the run folder."""

from moe_train.observe.report.page import write_report
from moe_train.observe.report.record import RunRecord

__all__ = ["RunRecord", "write_report"]
