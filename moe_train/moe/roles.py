"""What a parameter is: the one tag that decides how it is initialised, reduced, counted in the norm and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import nn


class Kind(StrEnum):
    """Who holds a parameter and which tokens it serves."""

    DENSE = "dense"
    """Replicated on every rank; serves every token."""
    ROUTER = "router"
    """Replicated on every rank; kept in fp32."""
    EXPERT = "expert"
    """Dimension 0 runs over this rank's experts; replicated over the expert-data group only."""


@dataclass(frozen=True)
class Role:
    """One parameter's role.

    Attributes:
        kind: who holds it.
        std: standard deviation of its normal initial values; None: all ones (the gains of norms).
        experts: for Kind.EXPERT, the global indices of the experts along dimension 0, in order of places. They may
            change between steps (`give_experts`): ask again instead of keeping them.
        truncated: values beyond two standard deviations are drawn again.
        mean: of the initial values.
        decays: whether a matrix is subject to weight decay; vectors never are.
        num_experts: for Kind.EXPERT, experts of the layer over all ranks; None: as many as a feed-forward layer has.
    """

    kind: Kind
    std: float | None
    experts: Sequence[int] = range(0)
    truncated: bool = False
    mean: float = 0.0
    decays: bool = True
    num_experts: int | None = None


def roles_of(model: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter by its name in ``model``.

    Modules that own parameters say so themselves in an attribute ``roles: dict[str, Role]``.
    """
    roles: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            declared: dict[str, Role] = getattr(module, "roles", {})
            assert name in declared, f"{type(module).__name__} declares no role for its parameter {name}"
            roles[f"{prefix}.{name}" if prefix else name] = declared[name]
    # Tied parameters appear once in named_parameters() and must appear once here.
    return {name: roles[name] for name, _ in model.named_parameters()}


def give_experts(module: nn.Module, experts: Sequence[int]) -> None:
    """Say which experts the parameters of a module are of, in order of places; values do not move."""
    for owner in module.modules():
        declared: dict[str, Role] = getattr(owner, "roles", {})
        if any(role.kind is Kind.EXPERT for role in declared.values()):
            owner.roles = {  # type: ignore[assignment]
                name: replace(role, experts=tuple(experts)) if role.kind is Kind.EXPERT else role
                for name, role in declared.items()
            }
