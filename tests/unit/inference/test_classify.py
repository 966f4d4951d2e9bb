"""Classes of texts from a model: a batch says what a text alone does, and what experts did is told of each token."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.schema import TrainConfig
from moe_train.config.task import SentimentTask
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import ConfigError
from moe_train.inference.classify import MOST_TOKENS, class_probabilities, explain, logits_of, watched_routers
from moe_train.inference.load import Trained
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange

TEXTS = ["fine", "a dull film", "x", "é ü " * 3] * 12
KINDS = {
    "blocks": ("model=moe_text_classifier", "model.dim=16", "model.heads=2", "model.ffn.expert_dim=8"),
    "head": ("model=moe_classifier",),
    "both": ("model=moe_text_classifier", "model.dim=16", "model.heads=2", "model.classifier.kind=experts"),
}


def trained(*overrides: str, seq_len: int = 16) -> Trained:
    words = ["task=sentiment", *overrides, f"data.seq_len={seq_len}", "model.classifier.num_classes=3"]
    config = compose_config("train", TrainConfig, lambda config: [], [*words, "model.init_std=0.3"])
    config = config.model_copy(update={"task": SentimentTask(classes=("bad", "so so", "good"))})
    tokenizer = Tokenizer.of_bytes()
    model = build_model(config.model, tokenizer.vocab_size, LocalExchange(4), "fp64", torch.device("cpu"))
    initialise(model, 1)
    return Trained(config, tokenizer, model.eval(), cast("Any", None), cast("Any", None))


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest) -> Trained:
    return trained(*KINDS[request.param])


def test_a_batch_says_what_each_text_alone_does(run: Trained) -> None:
    found_NC = class_probabilities(run, TEXTS)
    assert found_NC.shape == (len(TEXTS), 3) and found_NC.dtype == torch.float32
    torch.testing.assert_close(found_NC.sum(dim=1), torch.ones(len(TEXTS)))
    alone_NC = torch.cat([class_probabilities(run, [text]) for text in TEXTS[:4]])
    torch.testing.assert_close(found_NC[:4], alone_NC, rtol=1e-6, atol=1e-7)
    assert alone_NC.std(dim=0).max() > 1e-4, "texts matter"


def test_white_space_around_a_text_and_what_is_too_long_do_not_count(run: Trained) -> None:
    cut, whole = class_probabilities(run, ["  abcdefghijklmnop \n", "abcdefghijklmnopqrstuvw"])
    assert torch.equal(cut, whole)
    assert explain(run, "abcdefghijklmnopqrstuvw").left_out == 7


def test_no_texts_have_no_probabilities(run: Trained) -> None:
    assert class_probabilities(run, []).shape == (0, 3)


def test_texts_without_tokens_are_all_named(run: Trained) -> None:
    with pytest.raises(ConfigError) as caught:
        class_probabilities(run, ["", "a", "  "])
    assert [problem.key for problem in caught.value.problems] == ["text 0", "text 2"]
    with pytest.raises(ConfigError, match="has no tokens"):
        explain(run, " \n")


def test_an_explanation_adds_up(run: Trained) -> None:
    found = explain(run, " a dull film")
    assert found.told == max(found.probabilities, key=lambda name: found.probabilities[name])
    assert sum(found.probabilities.values()) == pytest.approx(1.0, abs=1e-6) and found.tokens == 11
    assert set(found.layers) == {key.name for key in run.model.expert_layers}
    for name, use in found.layers.items():
        assert sum(use.first_choice) == pytest.approx(1.0, abs=1e-6)
        assert sum(use.weight) == pytest.approx(1.0, abs=1e-6), "weights of a token sum to one in these models"
        if name.endswith("_head"):
            assert use.by_token == () and max(use.first_choice) == 1.0
        else:
            words, experts = zip(*use.by_token, strict=True)
            assert "".join(words) == "a dull film"
            shares = [experts.count(expert) / 11 for expert in range(4)]
            assert shares == pytest.approx(use.first_choice, abs=1e-6)
    told = found.as_json()
    assert told["class"] == found.told and set(told["probabilities"]) == {"bad", "so so", "good"}


def test_watching_changes_nothing_and_ends() -> None:
    run = trained(*KINDS["both"])
    tokens = [[5, 6, 7]]
    with torch.no_grad():
        before = logits_of(run, tokens)
        with watched_routers(run.model) as found:
            during = logits_of(run, tokens)
        seen = dict(found)
        logits_of(run, [[9, 9, 9, 9]])
    assert torch.equal(before, during) and len(seen) == 2
    assert all(found[name] is seen[name] for name in seen), "what comes after is not watched"


def test_long_texts_are_not_told_token_by_token() -> None:
    run = trained(*KINDS["blocks"], seq_len=200)
    assert explain(run, "a" * MOST_TOKENS).layers["layer_00"].by_token
    assert not explain(run, "a" * (MOST_TOKENS + 1)).layers["layer_00"].by_token
