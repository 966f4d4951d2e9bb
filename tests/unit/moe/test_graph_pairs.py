"""The gate on pairs without pairs: no tensor holds all pairs of a token's vectors, forward or backward."""

from typing import Any

import pytest
import torch
from graph_samples import SIMILARITIES, assert_close, conv_of, random
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.config.graph import GraphConfig
from moe_train.moe.graph import conv as conv_module
from moe_train.moe.graph.similarity import PairGate

TOKENS, EXPERTS, DIM = 8, 16, 32
PAIRS = TOKENS * EXPERTS * EXPERTS
VECTORS = TOKENS * EXPERTS * DIM
"""Numbers in one tensor over all pairs, and in one over all vectors."""


class Largest(TorchDispatchMode):
    """Looks at every tensor that any operation makes, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


class PairwiseGate(nn.Module):
    """The same gate as it is written: on the concatenation of every pair."""

    def __init__(self, gate: PairGate) -> None:
        super().__init__()
        self.pair = gate.pair

    def forward(self, h_TED: Tensor) -> Tensor:
        tokens, num_experts, dim = h_TED.shape
        receiver = h_TED.unsqueeze(2).expand(tokens, num_experts, num_experts, dim)
        sender = h_TED.unsqueeze(1).expand(tokens, num_experts, num_experts, dim)
        return torch.sigmoid(self.pair(torch.cat([receiver, sender], dim=-1))).squeeze(-1)


def largest_of(graph: GraphConfig, pairwise: bool = False) -> Largest:
    conv, h_TED = conv_of(EXPERTS, graph, dim=DIM), random(TOKENS, EXPERTS, DIM).requires_grad_()
    if pairwise:
        conv.messages.similarity = PairwiseGate(conv.messages.similarity)
    with Largest() as largest:
        conv(h_TED)[0].square().sum().backward()
    return largest


@pytest.mark.parametrize("max_neighbors", [None, 1, 4])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("limit", [0, 100], ids=["by products", "gathered"])
def test_no_tensor_holds_all_pairs_of_vectors(
    similarity: str, max_neighbors: int | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_module, "GATHER_UP_TO", limit)
    largest = largest_of(GraphConfig(similarity=similarity, max_neighbors=max_neighbors))
    assert largest.numel == max(VECTORS, PAIRS)
    assert largest.bytes == 8 * max(VECTORS, PAIRS), "nor does one behind a view"


def test_the_gate_on_concatenated_pairs_would_hold_them() -> None:
    """Or the test above could not fail; and it is the same gate."""
    largest = largest_of(GraphConfig(), pairwise=True)
    assert largest.numel == PAIRS * 2 * DIM > 30 * VECTORS
    gate = conv_of(EXPERTS, GraphConfig(), dim=DIM).messages.similarity
    h_TED = random(TOKENS, EXPERTS, DIM)
    assert_close([gate(h_TED)], [PairwiseGate(gate)(h_TED)])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_nor_is_one_kept_for_the_backward_pass(similarity: str) -> None:
    """A few tensors over all vectors and over all pairs of experts, however many experts there are."""
    for num_experts in (4, 16):
        conv = conv_of(num_experts, GraphConfig(similarity=similarity), dim=DIM)
        h_TED = random(TOKENS, num_experts, DIM).requires_grad_()
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y_TED, messages = conv(h_TED)
        weights = sum(p.numel() for p in conv.parameters())
        vectors, pairs = TOKENS * num_experts * DIM, TOKENS * num_experts**2
        assert sum(kept.values()) <= 8 * (5 * vectors + 4 * pairs + weights)
        assert (y_TED.shape, messages.strength_TEE.shape) == (h_TED.shape, (TOKENS, num_experts, num_experts))
        assert F.gelu(y_TED).isfinite().all()
