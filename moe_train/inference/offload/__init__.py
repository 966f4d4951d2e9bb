"""Routed experts that stay on disk, with a cache of those used most (docs/offload.md).

`record` is one expert's file; `folder` all of them, written from a checkpoint by `source`; `policy` and `cache` decide
who is in memory; `experts` computes with them; `install` puts them into a model.
"""
