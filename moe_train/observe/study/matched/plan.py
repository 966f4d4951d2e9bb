"""What the matched studies compare: which variant stands beside which, and what is equal in both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Match: TypeAlias = Literal["parameters", "training FLOPs", "tokens"]
"""What two variants have in common. Training FLOPs are those of the whole run."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Contender:
    """A variant beside the reference of its group.

    Attributes:
        variant: its name, that of a file in ``configs/study``.
        equal: what it has in common with the reference.
        what: it is, in a few words.
    """

    variant: str
    equal: tuple[Match, ...]
    what: str


@dataclass(frozen=True)
class Group:
    """Variants that are compared with one of them.

    Attributes:
        reference: the variant that the others are compared with.
        what: the reference is, in a few words.
        contenders: the others.
    """

    reference: str
    what: str
    contenders: tuple[Contender, ...]

    @property
    def variants(self) -> list[str]:
        """All names, the reference's first."""
        return [self.reference, *(contender.variant for contender in self.contenders)]


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: of its experiment, and the beginning of its runs' names.
        groups: what is compared; no variant stands in two.
    """

    name: str
    groups: tuple[Group, ...]

    @property
    def variants(self) -> list[str]:
        """All names in order."""
        return [variant for group in self.groups for variant in group.variants]

    def group_of(self, variant: str) -> Group | None:
        """Return where a variant stands; None for one that the study does not know."""
        return next((group for group in self.groups if variant in group.variants), None)

    def told(self, variant: str) -> tuple[str, tuple[Match, ...]]:
        """Return what a variant is and what it has in common with its reference, which has nothing to say of that."""
        for group in self.groups:
            if variant == group.reference:
                return group.what, ()
            for contender in group.contenders:
                if variant == contender.variant:
                    return contender.what, contender.equal
        return "", ()


SWITCHHEAD_STUDY = Plan(
    "switchhead_study",
    (
        Group(
            "heads_dense",
            "8 dense heads, dense feed-forward layers",
            (
                Contender("heads_few", ("parameters", "training FLOPs"), "2 dense heads, four times as wide"),
                Contender("heads_switch", ("parameters",), "SwitchHead: 2 heads of 4 experts"),
                Contender("heads_switch_wide", ("training FLOPs",), "SwitchHead: the same with wider heads"),
            ),
        ),
        Group(
            "heads_sparse",
            "8 dense heads, top-2 of 8 experts (softmax, SwiGLU)",
            (Contender("heads_switchall", ("parameters",), "SwitchAll: SwitchHead, top-2 of 8 (sigmoid, ReLU)"),),
        ),
    ),
)
"""Do experts in attention pay? At equal parameters SwitchHead multiplies less; at equal FLOPs it stores more."""

DEPTH_STUDY = Plan(
    "depth_study",
    (
        Group(
            "depth_dense",
            "4 dense blocks",
            (
                Contender("depth_mod", ("training FLOPs",), "8 blocks, every other of them takes 1/8 of the tokens"),
                Contender("depth_mod_classifier", ("training FLOPs",), "the same, causal choice by the score itself"),
                Contender("depth_mod_longer", ("parameters", "training FLOPs"), "4 blocks, two of them so, longer"),
                Contender("depth_mod_same", ("parameters", "tokens"), "4 blocks, two of them so"),
            ),
        ),
        Group(
            "depth_moe",
            "4 blocks, top-2 of 8 experts",
            (
                Contender("depth_staged", ("training FLOPs",), "8 blocks, every other takes 1/8; top-2 of 8 experts"),
                Contender("depth_integrated", ("training FLOPs",), "4 blocks, top-4 of 8 experts and 8 no-ops"),
            ),
        ),
    ),
)
"""Do tokens that pass blocks by pay? With what they save the model is deeper, or trained on more tokens."""
