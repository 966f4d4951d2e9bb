"""A watch over operations that make the host wait for the device, which on the CPU nobody would notice."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "unique_dim", "_unique2"}


class NoWaiting(TorchDispatchMode):
    """Fails at the first operation whose result the host must know to go on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert name not in WAITING and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
