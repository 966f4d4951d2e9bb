"""The random state of a process goes to bytes and back."""

import torch

from moe_train.training.random import random_state, restore_random_state

CPU = torch.device("cpu")


def test_round_trip() -> None:
    torch.manual_seed(5)
    state = random_state(CPU)
    first = torch.rand(4)
    assert not torch.equal(torch.rand(4), first)
    restore_random_state(state, CPU)
    assert torch.equal(torch.rand(4), first)
