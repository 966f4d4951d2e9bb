"""The second engine: DeepSpeed's ZeRO around the same model, exchange, data and checkpoints.

DeepSpeed is an optional dependency: only `runtime` imports it, and only `build` imports that, when it is asked for.
"""
