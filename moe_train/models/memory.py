"""What a model remembers of a text while it continues it: what attention makes of each token, made once.

Per token and block that is, in numbers of the activations' dtype (2 bytes each in bf16, 4 in fp32):

- grouped queries: 2 · G · W, a key and a value of each of G heads of width W (arXiv 2305.13245); where there is a
  window, of at most as many tokens as it holds;
- latent attention: kv_rank + rope_dim, whatever the number of heads (DeepSeek-V2, arXiv 2405.04434, section 2.1.4).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

LEAST_ROOM = 16
"""Positions for which there is room from the beginning."""


class Memory:
    """What one attention keeps of the tokens it has seen, in order. Nothing in it has a gradient.

    There is room for up to twice the positions that are kept (at least `LEAST_ROOM`): a token is written in its place,
    and only when the room is used up does what is kept move, so that remembering n tokens moves fewer than 2 n in all.
    """

    def __init__(self) -> None:
        self._rooms: tuple[Tensor, ...] = ()
        self._first = 0
        self._end = 0

    @property
    def length(self) -> int:
        """Positions that are kept."""
        return self._end - self._first

    @property
    def num_bytes(self) -> int:
        """Bytes of the room."""
        return sum(room.numel() * room.element_size() for room in self._rooms)

    def extend(self, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        """Add tokens; return what they and all those before them, as far as any of them sees, left here.

        Args:
            new: keys, values, or what else an attention keeps: each [B, heads, S, width]; the same at every call.
            window: positions that a token sees, its own included: others are forgotten; None: it sees all earlier ones.

        Returns:
            As many tensors [B, heads, J, width], J >= S; good until the next call.
        """
        num = new[0].shape[2]
        if window is not None:
            self._keep(window - 1)
        if self._end + num > self._room or not self._rooms:
            self._move(new, max(LEAST_ROOM, 2 * (self.length + num)))
        for room, tensor in zip(self._rooms, new, strict=True):
            room[:, :, self._end : self._end + num] = tensor.detach()
        self._end += num
        seen = tuple(self._kept())
        if window is not None:
            self._keep(window)
            room_positions = max(LEAST_ROOM, 2 * window)
            if self._room > room_positions:  # a prompt longer than the window was here
                self._move(new, room_positions)
        return seen

    @property
    def _room(self) -> int:
        """Positions for which there is room."""
        return self._rooms[0].shape[2] if self._rooms else 0

    def _kept(self) -> Iterator[Tensor]:
        """Yield what is kept, without copying it."""
        return (room[:, :, self._first : self._end] for room in self._rooms)

    def _keep(self, num: int) -> None:
        """Forget all but the last positions."""
        self._first = max(self._first, self._end - num)

    def _move(self, like: tuple[Tensor, ...], positions: int) -> None:
        """Move what is kept to the beginning of new room for so many positions; what was handed out stays."""
        rooms = tuple(t.new_empty(*t.shape[:2], positions, t.shape[3]) for t in like)
        for room, kept in zip(rooms, self._kept(), strict=False):  # at first nothing is
            room[:, :, : self.length] = kept
        self._rooms, self._first, self._end = rooms, 0, self.length


class TextMemory:
    """The memories of all blocks of a model, of one text or of several equally long ones.

    Args:
        num_blocks: of the model.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Memory() for _ in range(num_blocks)]
        self.length = 0
        """Tokens that the model has seen; a block may have seen, or may keep, fewer of them."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all memories."""
        return sum(block.num_bytes for block in self.blocks)
