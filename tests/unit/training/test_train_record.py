"""What of a step's figures stands in every record."""

from __future__ import annotations

from moe_train.training.loop import without_matrices


def test_matrices_are_left_out_and_nothing_else() -> None:
    numbers = {"loss": 1.5, "moe/layer_00/load": [0.5, 0.5], "moe/layer_00/message_strength": [], "word": "x"}
    matrices = {"moe/layer_00/cosines": [[1.0, 0.2], [0.2, 1.0]], "moe/layer_00/adjacency": [[[0.0, 1.0], [1.0, 0.0]]]}
    assert without_matrices(numbers | matrices) == numbers
