"""moe_train: train Mixture-of-Experts language models with their experts sharded over ranks.

Its layers stand on their own too: ``from moe_train import MoELayer, ExpertRouter, SwitchFFN, DeepSeekMoE``, and
``GraphCoupledMoE, ExpertGraphConv``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_train.layers import DeepSeekMoE, ExpertGraphConv, ExpertRouter, GraphCoupledMoE, MoELayer, SwitchFFN

__version__ = "0.1.0"
__all__ = ["DeepSeekMoE", "ExpertGraphConv", "ExpertRouter", "GraphCoupledMoE", "MoELayer", "SwitchFFN"]


def __getattr__(name: str) -> object:
    """Import the layers when they are asked for (PEP 562): torch takes seconds, which ``import moe_train`` must not."""
    if name in __all__:
        from moe_train import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name the layers though they are not imported yet."""
    return sorted({*globals(), *__all__})
