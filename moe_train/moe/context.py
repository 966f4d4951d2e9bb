"""What a layer knows of its tokens beside their vectors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_train.dist.peers import Alone, Peers
from moe_train.ops.random import derive_seed, random_bits, uniform


class Purpose(IntEnum):
    """What a random draw is for: each purpose has numbers of its own."""

    JITTER = 1
    NOISE = 2
    SECOND_EXPERT = 3
    DISPATCH = 4
    EXPERT_DROPOUT = 5
    OVERFLOW = 6
    EXEMPTION = 7
    TOKEN_DROPOUT = 8


@dataclass(frozen=True)
class RoutingContext:
    """The tokens of one forward pass.

    Attributes:
        ids_BS: [B, S] int64 token ids; for a layer alone, which has none, their places.
        sequences_B: [B] int64, each sequence's place in the global batch of the optimizer step: the same on every
            layout, so that what is drawn for a token is too.
        valid_BS: [B, S] bool, False for padding, which visits no expert and counts nowhere; None when all are valid.
        seed: of the draws of this step and layer.
        peers: the ranks that hold the rest of the batch.
        positions_BS: [B, S] int64, position of each token in its sequence, rising; None: 0 to S - 1.
        span: positions of a whole sequence, where some are missing here; None: S.
        classes_B: [B] int64, class of each sequence, negative where it has none; with them layers record which experts
            take which class. None: sequences have no classes.
        num_classes: number of classes; 0 without them.
    """

    ids_BS: Tensor
    sequences_B: Tensor
    valid_BS: Tensor | None = None
    seed: int = 0
    peers: Peers = field(default_factory=Alone)
    positions_BS: Tensor | None = None
    span: int | None = None
    classes_B: Tensor | None = None
    num_classes: int = 0

    @staticmethod
    def of(ids_BS: Tensor, valid_BS: Tensor | None = None) -> RoutingContext:
        """Return the context of a batch that is whole in this process, with draws from seed 0."""
        return RoutingContext(ids_BS, torch.arange(ids_BS.shape[0], device=ids_BS.device), valid_BS)

    def at_layer(self, depth: int) -> RoutingContext:
        """Return the context in a layer: its draws are its own."""
        return replace(self, seed=derive_seed(self.seed, depth))

    def ahead(self, steps: int) -> RoutingContext:
        """Return the context of a module of multi-token prediction: each place holds the token ``steps`` later.

        The last places of a sequence, and those before padding, have no token to predict: they become padding.
        """
        valid_BS = torch.ones_like(self.ids_BS, dtype=torch.bool) if self.valid_BS is None else self.valid_BS
        return replace(self, ids_BS=ahead(self.ids_BS, steps), valid_BS=ahead(valid_BS, steps))

    def chosen(self, indices_BC: Tensor, valid_BC: Tensor | None = None) -> RoutingContext:
        """Return the context of some of the tokens, which keep their places in the global batch.

        Args:
            indices_BC: [B, C] int64, rising, which of the S tokens.
            valid_BC: [B, C] bool, False where an index only fills up a row; None: all are meant.
        """
        positions_BS = self.positions_BS
        if self.valid_BS is not None:
            chosen_BC = self.valid_BS.gather(1, indices_BC)
            valid_BC = chosen_BC if valid_BC is None else valid_BC & chosen_BC
        return replace(
            self,
            ids_BS=self.ids_BS.gather(1, indices_BC),
            valid_BS=valid_BC,
            positions_BS=indices_BC if positions_BS is None else positions_BS.gather(1, indices_BC),
            span=self.span or self.length,
        )

    def texts(self) -> RoutingContext:
        """Return the context of the sequences themselves, each as one token: valid where it has a valid token."""
        valid_B1 = None if self.valid_BS is None else self.valid_BS.any(dim=1, keepdim=True)
        return replace(self, ids_BS=self.ids_BS[:, :1], valid_BS=valid_B1, positions_BS=None, span=None)

    @property
    def length(self) -> int:
        """Positions S of a sequence."""
        return self.ids_BS.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens T of this pass on this rank, padding included."""
        return self.ids_BS.numel()

    @property
    def valid_T(self) -> Tensor:
        """[T] bool, False for padding."""
        if self.valid_BS is None:
            return torch.ones(self.num_tokens, dtype=torch.bool, device=self.ids_BS.device)
        return self.valid_BS.flatten()

    @property
    def classes_T(self) -> Tensor:
        """[T] int64, class of each token's sequence; negative for padding, and where the sequence has none."""
        assert self.classes_B is not None, "these sequences have no classes"
        return self.classes_B.repeat_interleave(self.length).masked_fill(~self.valid_T, -1)

    @property
    def places_T(self) -> Tensor:
        """[T] int64, each token's place in the global batch: sequence · S + position."""
        positions_BS = self.positions_BS
        if positions_BS is None:
            positions_BS = torch.arange(self.length, device=self.ids_BS.device)
        return (self.sequences_B.unsqueeze(1) * (self.span or self.length) + positions_BS).flatten()

    def uniform(self, purpose: Purpose, num: int) -> Tensor:
        """Return ``num`` fp32 numbers in (0, 1) for each token: [T, num]."""
        return uniform(derive_seed(self.seed, purpose), self.counters(self.places_T, num))

    def bits(self, purpose: Purpose, num: int) -> Tensor:
        """Return ``num`` random int64 for each token: [T, num]."""
        return random_bits(derive_seed(self.seed, purpose), self.counters(self.places_T, num))

    def uniform_per_sequence(self, purpose: Purpose) -> Tensor:
        """Return one fp32 number in (0, 1) for each sequence: [B]."""
        return uniform(derive_seed(self.seed, purpose), self.sequences_B)

    @staticmethod
    def counters(places_T: Tensor, num: int) -> Tensor:
        """Return the numbers of the draws of each token: place · num + 0 ... num - 1."""
        return places_T.unsqueeze(1) * num + torch.arange(num, device=places_T.device)


def ahead(values_BS: Tensor, steps: int) -> Tensor:
    """Return [B, S] with the value ``steps`` positions later at each place, zeros (False) at the last ones."""
    return F.pad(values_BS[:, steps:], (0, min(steps, values_BS.shape[1])))
