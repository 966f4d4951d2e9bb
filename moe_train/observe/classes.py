"""How well a model tells the classes of texts, and how its experts share them: figures from counts alone.

A confusion matrix has a row per true class and a column per class that was told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.observe.records import ROUTED, finite, layer_title, moe_layers

BY_CLASS = "by_class"
"""The figure of a layer with experts where the texts have classes: [classes][experts] tokens by first choice."""
UTILISATION = "utilisation"
"""The same layer's [experts]: share of the tokens that have each expert as first choice."""
OF_CLASSES = (BY_CLASS, UTILISATION, "specialisation", "load_balance_variance")
"""All that is known of such a layer only."""
REMEDY = "switch on model.ffn.balance.aux, or raise its coef"
UNUSED_SHARE = 0.1
"""An expert with less than this part of an even share counts as unused, or as hardly ever the first choice."""
WHOLE_SHARE = 0.9
"""An expert with more than this share of the first choices counts as the only one."""

Counts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Verdicts:
    """What a confusion matrix says; a share of nothing is 0, as the class that it would speak of was never told.

    Attributes:
        accuracy: share of the texts whose class was told.
        majority: accuracy of always telling the class that most texts have.
        precision: per class, of the texts told to be of it the share that are.
        recall: per class, of its texts the share that were told.
        macro_f1: mean over the classes of 2·P·R / (P + R), each class counting alike.
    """

    accuracy: float
    majority: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    macro_f1: float

    @staticmethod
    def of(confusion: Counts) -> Verdicts:
        """Sum up a confusion matrix of at least one text and one class."""
        classes = range(len(confusion))
        right = [confusion[c][c] for c in classes]
        true, told = [sum(row) for row in confusion], [sum(row[c] for row in confusion) for c in classes]
        texts = sum(true)
        # F1 = 2·TP / (true + told), which is 2·P·R / (P + R) without its division by zero.
        f1 = [ratio(2 * right[c], true[c] + told[c]) for c in classes]
        return Verdicts(
            accuracy=ratio(sum(right), texts),
            majority=ratio(max(true), texts),
            precision=tuple(map(ratio, right, told)),
            recall=tuple(map(ratio, right, true)),
            macro_f1=sum(f1) / len(f1),
        )


def ratio(part: float, whole: float) -> float:
    """Return part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def collapse_words(first: Sequence[float], load: Sequence[float], title: str) -> str:
    """Return the sentence that says whether a layer's experts are all used.

    An expert that is no token's first choice may still work for many as their second: it is not unused.

    Args:
        first: [E] shares of the first choices, which sum to one.
        load: [E] shares of all choices, which sum to one.
        title: of the layer.
    """
    num_experts = len(first)
    least = UNUSED_SHARE / num_experts
    unused = [expert for expert, share in enumerate(load) if share < least]
    second = [expert for expert, share in enumerate(first) if share < least and expert not in unused]
    fullest = max(range(num_experts), key=lambda expert: first[expert])
    found = []
    if num_experts > 1 and first[fullest] > WHOLE_SHARE:
        found.append(f"expert {fullest} is the first choice of {first[fullest]:.0%}")
    if unused:
        found.append(f"{listed(unused)} unused (below {least:.1%} of all choices; even is {1 / num_experts:.1%})")
    if found:
        return f"{title}: {' and '.join(found)}: the router has collapsed; {REMEDY}."
    if second:
        shares = f"{sum(load[expert] for expert in second):.0%} of all choices"
        return f"{title}: every expert is used, but {listed(second)} hardly ever the first choice (with {shares})."
    return f"{title}: every expert is used, for {min(first):.0%} to {first[fullest]:.0%} of the first choices."


def listed(experts: Sequence[int]) -> str:
    """Return ``expert 3 is`` or ``experts 1, 3 and 4 are``."""
    *first, last = map(str, experts)
    return f"experts {', '.join(first)} and {last} are" if first else f"expert {last} is"


def collapses(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sentence of each layer whose use of its experts a record tells."""
    for layer in moe_layers(record, UTILISATION):
        first, load = (shares_in(record.get(f"moe/{layer}/{name}")) for name in (UTILISATION, ROUTED))
        if first and len(first) == len(load):
            yield collapse_words(first, load, layer_title(layer))


def shares_in(told: object) -> list[float]:
    """Return a list of finite shares of which something is more than nothing; else an empty one."""
    found = [finite(share) for share in told] if isinstance(told, list) else []
    known = [share for share in found if share is not None]
    return known if len(known) == len(found) and sum(known) > 0 else []
