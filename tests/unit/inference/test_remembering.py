"""A text that is remembered goes on as one that is read again for every token, in every kind of model."""

from __future__ import annotations

import pytest
import torch
from continued_texts import (
    LENGTH,
    MLA,
    MODELS,
    PROMPT,
    TWO_KEY_HEADS,
    VOCAB,
    WHOLE,
    built,
    config_of,
    prompt,
    sample,
    scores,
)

from moe_train.config.model import ModelConfig
from moe_train.inference.sampler import can_remember, generate
from moe_train.models.transformer import Transformer

EACH = pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
BOUNDS = {"fp64": 1e-10, "fp32": 1e-5}


@EACH
@pytest.mark.parametrize("precision", BOUNDS)
def test_scores_are_those_of_the_whole_text(overrides: tuple[str, ...], precision: str) -> None:
    model, text_S = built(overrides, precision), prompt(LENGTH)
    assert can_remember(model.config)
    found_SV, expected_SV = scores(model, text_S, True), scores(model, text_S, False)
    whole_SV = model(torch.tensor([text_S])).logits_BSV[0, PROMPT - 1 :].double()
    bound = BOUNDS[precision] * expected_SV.abs().max()
    assert (found_SV - expected_SV).abs().max() <= bound
    assert (found_SV - whole_SV).abs().max() <= bound, "and what training says of them"
    assert expected_SV.std(dim=0).mean() > 1e-2, "the text matters"


@EACH
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_text_is_the_same(overrides: tuple[str, ...], temperature: float) -> None:
    model, config = built(overrides), sample(temperature=temperature)
    found, expected = (generate(model, prompt(), config, VOCAB, 64, remember) for remember in (True, False))
    assert found == expected
    assert len(found) == LENGTH - PROMPT


def read_by(model: Transformer, remember: bool, num: int, context: int, max_tokens: int) -> tuple[list[int], list[int]]:
    """How many tokens each pass read, and the text."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    text = generate(model, prompt(num), sample(max_tokens), VOCAB, context, remember)
    handle.remove()
    return seen, text


@pytest.mark.parametrize(
    ("num", "context", "read"),
    [
        (4, 64, [4, 1, 1, 1, 1, 1]),
        (4, 6, [4, 1, 1, 6, 6, 6]),
        (6, 6, [6, 6, 6, 6, 6, 6]),
        (9, 6, [6, 6, 6, 6, 6, 6]),
        (1, 64, [1] * 6),
        (1, 1, [1] * 6),
    ],
)
@pytest.mark.parametrize(
    "overrides", [TWO_KEY_HEADS, MODELS["learned positions"], MLA], ids=["rotary", "learned", "latent"]
)
def test_a_text_beyond_the_context_is_read_again(
    num: int, context: int, read: list[int], overrides: tuple[str, ...]
) -> None:
    """The prompt once, then each token alone, until the oldest are forgotten."""
    model = built(overrides)
    seen, found = read_by(model, True, num, context, len(read))
    assert seen == read
    seen, expected = read_by(model, False, num, context, len(read))
    assert seen == [min(context, num + i) for i in range(len(read))]
    assert found == expected


@pytest.mark.parametrize("overrides", WHOLE.values(), ids=WHOLE.keys())
def test_models_that_must_see_the_whole_text_read_it(overrides: tuple[str, ...]) -> None:
    """Capacity limits hold among the tokens of a pass; experts that are blocks remember nothing."""
    model = built(overrides)
    assert not can_remember(model.config)
    assert read_by(model, True, 3, 64, 3)[0] == [3, 4, 5]
    assert can_remember(config_of(*overrides, "model.ffn.num_experts=0")), "without experts there are no such layers"


def test_limits_of_capacity_in_evaluation_do_change_the_scores() -> None:
    """So the refusal has a reason: a token that comes alone finds room that it has not in its text."""
    model = built(WHOLE["capacity in evaluation"])
    text_S = prompt(LENGTH)
    assert (scores(model, text_S, True) - scores(model, text_S, False)).abs().max() > 1e-3


def test_the_presets_can_remember() -> None:
    """All but the one whose experts are blocks."""
    names = ("dense_tiny", "sparse_tiny", "deepseek_tiny", "deepseek_v3_tiny", "switch_tiny", "glam_tiny", "graph_tiny")
    configs: list[ModelConfig] = [config_of(f"model={name}") for name in names]
    assert all(map(can_remember, configs))


@pytest.mark.parametrize("remember", [True, False])
def test_the_model_is_left_as_it_was(remember: bool) -> None:
    model = built(())
    for training in (True, False):
        model.train(training)
        generate(model, prompt(), sample(2), VOCAB, 64, remember)
        assert model.training is training


@pytest.mark.parametrize("remember", [True, False])
def test_a_boundary_ends_the_text_and_the_passes_go_on(remember: bool) -> None:
    """Other ranks may still exchange tokens with this one."""
    model = built(())
    text = generate(model, prompt(), sample(), VOCAB, 64, remember)
    boundary, seen = text[3], []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    assert generate(model, prompt(), sample(), boundary, 64, remember) == text[: text.index(boundary)]
    assert len(seen) == len(text)


def test_a_compiled_model_compiles_nothing_to_generate() -> None:
    """Every token would be another length to compile for."""
    model, calls = built(()), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append(len(inputs))
        return graph.forward

    expected = generate(model, prompt(), sample(), VOCAB, 64)
    for block in model.blocks:
        block.attend = torch.compile(block.attend, backend=backend)
    assert generate(model, prompt(), sample(), VOCAB, 64) == expected
    assert calls == []
    model(torch.tensor([prompt()]))
    assert calls, "elsewhere it is compiled"
