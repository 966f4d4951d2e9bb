"""Peers: what ranks learn of each other's tokens."""

import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor

from moe_train.dist.peers import Alone, Together
from moe_train.dist.world import World

RANKS = 3


def counts_of(rank: int) -> Tensor:
    return torch.tensor([rank + 1, 10 * rank, 7])


def rows_of(rank: int) -> Tensor:
    return torch.arange(4.0).view(2, 2) + 100 * rank


def ask(world: World) -> dict[str, object]:
    """What one rank hears, and whether what it said was left as it was."""
    assert dist.group.WORLD is not None
    peers, counts, rows = Together(dist.group.WORLD), counts_of(world.rank), rows_of(world.rank).requires_grad_()
    total, before = peers.sum(counts), peers.before(counts)
    transposed, _ = peers.gather(rows.T)
    gathered, first = peers.gather(rows)
    return {
        "total": total,
        "before": before,
        "gathered": gathered.detach(),
        "first": first,
        "transposed": transposed.detach(),
        "carries gradient": gathered.requires_grad or peers.sum(rows).requires_grad,
        "untouched": torch.equal(counts, counts_of(world.rank)) and torch.equal(rows, rows_of(world.rank)),
    }


def test_trap_12_ranks_together_hear_the_same_in_the_order_of_ranks() -> None:
    answers = run_ranks(ask, RANKS)
    for rank, answer in enumerate(answers):
        assert torch.equal(answer["total"], sum(counts_of(r) for r in range(RANKS)))
        assert torch.equal(
            answer["before"], sum((counts_of(r) for r in range(rank)), torch.zeros(3, dtype=torch.int64))
        )
        assert torch.equal(answer["gathered"], torch.cat([rows_of(r) for r in range(RANKS)]))
        assert answer["first"] == 2 * rank
        assert torch.equal(answer["transposed"], torch.cat([rows_of(r).T for r in range(RANKS)])), "not contiguous"
        assert not answer["carries gradient"]
        assert answer["untouched"], "a reduction in place would change what others still read"


def test_alone_a_process_hears_itself() -> None:
    rows = rows_of(1).requires_grad_()
    gathered, first = Alone().gather(rows)
    assert torch.equal(gathered, rows)
    assert first == 0
    assert torch.equal(Alone().sum(rows), rows)
    assert torch.equal(Alone().before(rows), torch.zeros(2, 2))
    assert not gathered.requires_grad
    assert not Alone().sum(rows).requires_grad
