"""Expert choice: perfect balance, and the leak of the future that comes with it."""

import pytest
import torch
from routing_cases import DIM, EXPERTS, ROUTERS, at_logits, context_of, ffn_of, random, router_of

BATCH, LENGTH = 3, 12
TOKENS = BATCH * LENGTH
CHOICE = ROUTERS["expert_choice"]


def test_every_expert_takes_equally_many_tokens_of_every_sequence() -> None:
    routing = at_logits(CHOICE, random(TOKENS, EXPERTS), context_of(BATCH, LENGTH), training=True)
    taken_BSE = routing.chosen_TK.view(BATCH, LENGTH, EXPERTS)
    assert (taken_BSE.sum(dim=1) == LENGTH * 2 // EXPERTS).all()
    assert taken_BSE.sum(dim=2).unique().numel() > 1, "tokens get different numbers of experts"


def test_an_expert_takes_the_tokens_that_score_it_highest() -> None:
    z_TE = random(TOKENS, EXPERTS)
    routing = at_logits(CHOICE, z_TE, context_of(BATCH, LENGTH), training=True)
    scores_BSE = z_TE.softmax(dim=1).view(BATCH, LENGTH, EXPERTS)
    for b in range(BATCH):
        for e in range(EXPERTS):
            column = scores_BSE[b, :, e].tolist()
            expected = sorted(range(LENGTH), key=lambda s, column=column: (-column[s], s))[: LENGTH * 2 // EXPERTS]
            found = routing.chosen_TK.view(BATCH, LENGTH, EXPERTS)[b, :, e].nonzero().flatten().tolist()
            assert found == sorted(expected)


def test_weights_are_the_softmax_over_experts_not_over_the_chosen_tokens() -> None:
    z_TE = random(TOKENS, EXPERTS)
    routing = at_logits(CHOICE, z_TE, context_of(BATCH, LENGTH), training=True)
    assert torch.equal(routing.experts_TK, torch.arange(EXPERTS).expand(TOKENS, -1))
    assert torch.equal(routing.weights_TK, z_TE.softmax(dim=1)), "not renormalised per token"


def test_among_equals_the_earliest_tokens_are_taken() -> None:
    routing = at_logits(CHOICE, torch.zeros(TOKENS, EXPERTS), context_of(BATCH, LENGTH), training=True)
    first = [True] * (LENGTH * 2 // EXPERTS) + [False] * (LENGTH - LENGTH * 2 // EXPERTS)
    assert routing.chosen_TK.view(BATCH, LENGTH, EXPERTS)[0, :, 5].tolist() == first


@pytest.mark.parametrize(("num_valid", "taken"), [(12, 3), (8, 2), (7, 1), (1, 1), (0, 0)])
def test_padding_is_never_taken_and_shortens_the_sequence(num_valid: int, taken: int) -> None:
    z_TE, valid_BS = random(LENGTH, EXPERTS), torch.arange(LENGTH).unsqueeze(0) < num_valid
    routing = at_logits(CHOICE, z_TE, context_of(1, LENGTH, valid_BS=valid_BS), training=True)
    assert not routing.chosen_TK[num_valid:].any()
    assert (routing.chosen_TK.sum(dim=0) == taken).all()
    if num_valid:
        alone = at_logits(CHOICE, z_TE[:num_valid], context_of(1, num_valid), training=True)
        assert torch.equal(routing.chosen_TK[:num_valid], alone.chosen_TK)


def test_no_more_is_taken_than_there_is() -> None:
    ffn = ffn_of("expert_choice", EXPERTS, EXPERTS, allow_future_leak=True)
    assert at_logits(ffn, random(TOKENS, EXPERTS), context_of(BATCH, LENGTH), training=True).chosen_TK.all()


def test_a_sequence_does_not_see_another() -> None:
    router, x_TD = router_of(CHOICE, training=True), random(TOKENS, DIM)
    other_TD = torch.cat([x_TD[:LENGTH], random(TOKENS - LENGTH, DIM, seed=5)])
    one, two = (router(tokens, context_of(BATCH, LENGTH)).chosen_TK[:LENGTH] for tokens in (x_TD, other_TD))
    assert torch.equal(one, two)
