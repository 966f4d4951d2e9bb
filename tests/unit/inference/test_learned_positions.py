"""Learned positions: a text is cut to as many tokens as there are, and modules that look ahead have them, too."""

from __future__ import annotations

import pytest
import torch

from moe_train.config.model import ModelConfig
from moe_train.config.schema import SampleConfig
from moe_train.inference.sampler import generate
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.ops.loss import cross_entropy_sum

VOCAB, LONGEST = 11, 6
GREEDY = SampleConfig(temperature=0.0, max_tokens=5)


def built(expert: str = "ffn", **keys: object) -> Transformer:
    config = ModelConfig.model_validate({
        "dim": 16, "layers": 1, "heads": 2, "positions": "learned", "max_positions": LONGEST, "init_std": 0.5,
        "ffn": {"num_experts": 2, "expert_dim": 8, "graph": {"expert": expert}}, **keys,
    })  # fmt: skip
    model = build_model(config, VOCAB, LocalExchange(2), "fp64", torch.device("cpu"))
    initialise(model, 0)
    return model


@pytest.mark.parametrize("expert", ["ffn", "block"])
@pytest.mark.parametrize("context", [LONGEST, 50])
def test_older_tokens_are_forgotten(expert: str, context: int) -> None:
    """Whatever context is asked for, no text is longer than the positions: the last tokens of a prompt decide."""
    model, prompt = built(expert), [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 1]
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    found = generate(model, prompt, GREEDY, boundary=VOCAB, context=context)
    assert seen == [LONGEST] * 5
    assert found == generate(model, prompt[-LONGEST:], GREEDY, boundary=VOCAB, context=LONGEST)
    assert len(found) == 5


def test_a_shorter_context_stays_shorter() -> None:
    model, seen = built(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    generate(model, [1, 2, 3, 4, 5], GREEDY, boundary=VOCAB, context=3)
    assert seen == [3] * 5


def test_the_place_of_a_token_matters() -> None:
    """Without positions, causal attention of one layer would see equal tokens alike everywhere."""
    logits_SV = built()(torch.full((1, LONGEST), 4)).logits_BSV[0]
    assert len({tuple(row) for row in logits_SV.tolist()}) == LONGEST


def test_modules_that_look_ahead_learn_with_learned_positions() -> None:
    model = built(mtp={"depth": 2}).train()
    tokens_BS = torch.randint(VOCAB, (2, LONGEST), generator=torch.Generator().manual_seed(0))
    output = model(tokens_BS)
    assert [logits.shape for logits in output.mtp_logits] == [(2, LONGEST, VOCAB)] * 2
    sum(cross_entropy_sum(logits.flatten(0, 1), tokens_BS.flatten()) for logits in output.mtp_logits).backward()
    assert model.positions_SD is not None and model.positions_SD.grad is not None
    assert model.positions_SD.grad.abs().sum(dim=1).gt(0).all()
