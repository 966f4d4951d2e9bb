"""What a person writes on the command line arrives letter by letter, whatever it means to Hydra."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe_train.config.compose import compose_config, with_force
from moe_train.config.schema import EvaluateConfig, GenerateConfig


def arrives(argument: str) -> object:
    """The value of an override after Hydra's grammar and OmegaConf's interpolation."""
    (override,) = OverridesParser.create().parse_overrides([with_force(argument)])
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


def is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]


@given(st.text(alphabet=st.sampled_from("ab,'\"\\ ${}[]()=:#\n!?é"), max_size=12).filter(lambda t: not is_quoted(t)))
@example("I don't like it, really")
@example("5")
@example("true")
@example("a=b")
@example("")
def test_a_sentence_is_one_value(text: str) -> None:
    assert arrives(f"text={text}") == text
    assert arrives(f"prompt={text}") == text


def test_quotes_and_null_mean_what_they_did() -> None:
    assert arrives("prompt='hello, world'") == "hello, world" and arrives('text="a"') == "a"
    assert arrives("text=null") is None
    assert arrives("data.text_field=5") == 5, "other keys keep Hydra's grammar"


@pytest.mark.parametrize("text", ["I don't like it, really", "[bad] {film}: ${x}", "7", "true"])
def test_doors_take_sentences(text: str) -> None:
    evaluate = compose_config("evaluate", EvaluateConfig, lambda config: [], ["run.dir=x", f"text={text}"])
    assert evaluate.text == text
    generate = compose_config("generate", GenerateConfig, lambda config: [], ["run.dir=x", f"prompt={text}"])
    assert generate.prompt == text
