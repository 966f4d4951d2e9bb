"""Hash layers: experts by token id alone."""

import dataclasses
import math

import torch
from routing_cases import DIM, EXPERTS, ROUTERS, context_of, ffn_of, random, router_of

from moe_train.moe.context import RoutingContext
from moe_train.ops.random import derive_seed, random_bits_reference

HASH = ROUTERS["hash"]
IDS_BS = torch.tensor([[5, 9, 5, 0], [70_000, 9, 1, 0]])


def test_the_choice_does_not_depend_on_the_tokens_vectors() -> None:
    router, context = router_of(HASH, training=True), RoutingContext.of(IDS_BS)
    one, two = router(random(8, DIM), context), router(100 * random(8, DIM, seed=1), context)
    assert torch.equal(one.experts_TK, two.experts_TK)
    assert torch.equal(one.weights_TK, two.weights_TK)


def test_the_same_id_meets_the_same_experts_everywhere() -> None:
    router, context = router_of(HASH), RoutingContext.of(IDS_BS)
    experts = [tuple(row) for row in router(random(8, DIM), context).experts_TK.tolist()]
    assert experts[0] == experts[2]
    assert experts[1] == experts[5]
    assert experts[3] == experts[7]
    for elsewhere in (
        context.at_layer(3),
        dataclasses.replace(context, seed=99),
        dataclasses.replace(context, sequences_B=torch.tensor([7, 3])),
    ):
        assert [tuple(row) for row in router(random(8, DIM), elsewhere).experts_TK.tolist()] == experts


def test_the_table_is_that_of_the_formula() -> None:
    found = router_of(HASH)(random(8, DIM), RoutingContext.of(IDS_BS)).experts_TK.tolist()
    for token, row in zip(IDS_BS.flatten().tolist(), found, strict=True):
        draws = [random_bits_reference(derive_seed(0), token * EXPERTS + e) >> 41 for e in range(EXPERTS)]
        assert row == sorted(range(EXPERTS), key=lambda e, draws=draws: (-draws[e], e))[:2]


def test_every_expert_gets_its_share_of_the_ids() -> None:
    num = 40_000
    routing = router_of(HASH)(torch.zeros(num, DIM), context_of(40, num // 40))
    counts_E = torch.bincount(routing.experts_TK.flatten(), minlength=EXPERTS).double()
    chance = 2 / EXPERTS
    assert ((counts_E - num * chance).abs() < 4 * math.sqrt(num * chance * (1 - chance))).all()


def test_weights_are_even_and_nothing_is_learnt() -> None:
    router = router_of(ffn_of("hash", EXPERTS, 4, scale=2.0))
    routing = router(random(8, DIM), RoutingContext.of(IDS_BS))
    assert torch.equal(routing.weights_TK, torch.full((8, 4), 0.5, dtype=torch.float64))
    assert routing.probabilities_TE.sum(dim=1).tolist() == [1.0] * 8
    assert list(router.parameters()) == []
    assert not routing.weights_TK.requires_grad
