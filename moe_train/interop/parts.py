"""How tensors of a public checkpoint and ours correspond: data, read in both directions.

A family of models is a table from the names of our parameters to lists of `Part`. Import fills our tensors from it,
export fills the public ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Index: TypeAlias = tuple[int | slice, ...]


@dataclass(frozen=True)
class Part:
    """One piece of one of our tensors, and where it lies in a public checkpoint.

    With P the public tensor: ``ours[self.ours] == factor · turn(P[self.theirs])``, where turn takes `rows` of
    dimension 0 and then, if `transposed`, swaps the last two dimensions.

    Attributes:
        name: of the public tensor.
        shape: of the whole public tensor.
        ours: place in our whole tensor (all experts); for expert tensors it begins with the expert's global index.
        theirs: place in the public tensor; begins with the expert's index where one tensor holds all experts.
        rows: [n] int64, our row i is row rows[i] of the public piece; None: the same order.
        transposed: public matrices of a linear map are [out, in]; those of our experts are [in, out].
        factor: what the public values are multiplied with to become ours.
        copy: a second copy in the public checkpoint of what another part holds: written, not read.
    """

    name: str
    shape: tuple[int, ...]
    ours: Index = ()
    theirs: Index = ()
    rows: Tensor | None = None
    transposed: bool = False
    factor: float = 1.0
    copy: bool = False

    @property
    def expert(self) -> int | None:
        """Global index of the expert that it belongs to; None when no single one."""
        first = self.ours[0] if self.ours else None
        return first if isinstance(first, int) else None


Parts: TypeAlias = Mapping[str, Sequence[Part]]
"""By name of our parameter or buffer (whole, as in the state dict of an unsharded model): the pieces it is made of."""
