"""Where records go: console, ``metrics.jsonl``, Weights & Biases. A sink that fails never stops the run."""

from moe_train.observe.sinks.base import RunContext, Sink, Status
from moe_train.observe.sinks.console import ConsoleSink
from moe_train.observe.sinks.group import SinkGroup, open_sinks
from moe_train.observe.sinks.jsonl import JsonlSink
from moe_train.observe.sinks.wandb import WandbSink

__all__ = ["ConsoleSink", "JsonlSink", "RunContext", "Sink", "SinkGroup", "Status", "WandbSink", "open_sinks"]
