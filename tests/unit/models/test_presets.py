"""Every preset is a possible model: small ones run forward and backward, published ones say what they are."""

import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.groups import options_of
from moe_train.config.model import ModelConfig
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.config.validate import key_paths
from moe_train.models.depth import DepthRecord
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.ops.loss import cross_entropy_sum

SCRIPT = Path(__file__).parents[3] / "scripts/count_models.py"
ADOPTING = {"pretrained"}
"""Presets whose architecture is that of a folder."""
TINY = [name for name in options_of("model") if name.endswith("_tiny")]
CLASSIFIERS = [name for name in options_of("model") if name.endswith("_classifier")]
PUBLISHED = [name for name in options_of("model") if name not in {*TINY, *ADOPTING, *CLASSIFIERS}]
VOCAB = 64


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("count_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@functools.cache
def composed(*overrides: str) -> ModelConfig:
    return compose_config("train", TrainConfig, train_problems, list(overrides)).model


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("preset", TINY)
def test_runs(preset: str) -> None:
    """With its own widths, on a few tokens; every parameter gets a gradient, those of further predictions too."""
    config = composed(f"model={preset}")
    model = build_model(config, VOCAB, LocalExchange(config.ffn.num_experts), "fp32", torch.device("cpu"))
    initialise(model, 0)
    # Labels of their own: the head is the embedding, so that a model may know the token it stands at from the start.
    tokens_BS, labels_BS = torch.randint(0, VOCAB, (2, 2, 8), generator=torch.Generator().manual_seed(0)).unbind()
    output = model(tokens_BS)
    assert len(output.mtp_logits) == config.mtp.depth
    losses = [
        cross_entropy_sum(logits_BSV.flatten(0, 1), labels_BS.flatten()) / labels_BS.numel()
        for logits_BSV in (output.logits_BSV, *output.mtp_logits)
    ]
    # What only a loss of its own layer reaches: the predictors of which tokens pass a block.
    own = [
        layer.balance.share(record, record.statistics)
        for layer, record in zip(model.expert_layers.values(), output.records, strict=True)
        if isinstance(record, DepthRecord)
    ]
    sum([*losses, *own]).backward()
    for loss in losses:
        assert 0.5 < loss.item() / torch.tensor(float(VOCAB)).log().item() < 1.5, "near the uniform guess"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("preset", TINY)
def test_a_tiny_preset_fits_a_laptop(preset: str, script) -> None:
    assert script.counts_of(preset).total < 15e6


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_model_is_possible_and_its_first_line_states_what_it_is(preset: str, script) -> None:
    config = composed(f"model={preset}", "data.seq_len=128")  # which the shortest learned positions allow
    assert config.vocab_size, "the published number, whatever the tokenizer"
    about = script.published(preset)
    assert about is not None
    assert about.exact == script.exact(script.counts_of(preset))


def magnitude(figure: str) -> tuple[float, float]:
    """A figure like 16.4B, and half a unit of its last digit."""
    number, unit = figure[:-1], {"M": 1e6, "B": 1e9, "T": 1e12}[figure[-1]]
    return float(number) * unit, 0.5 * 10.0 ** -len(number.partition(".")[2]) * unit


DIFFERENT = {f"switch_base_{experts}" for experts in (8, 16, 32, 64, 128, 256)}
"""Relatives of models of another shape."""


@pytest.mark.parametrize("preset", sorted(set(PUBLISHED) - DIFFERENT))
def test_the_total_is_the_published_figure_but_for_rounding(preset: str, script) -> None:
    figure, half = magnitude(script.published(preset).figures.partition(",")[0])
    assert abs(script.counts_of(preset).main - figure) <= half


@pytest.mark.parametrize(
    ("preset", "overrides", "changed"),
    [
        ("switch_base_16", ["model/ffn/router=topk", "model.ffn.top_k=2"], {"router": "topk"}),
        ("switch_base_16", ["model/ffn/capacity=dropless"], {"capacity": "dropless"}),
        ("gpt_oss_120b", ["model.layers=3", "model.ffn.num_experts=8"], {"layers": 3, "experts": 8}),
        ("qwen3_235b_a22b", ["model/attention=mla"], {"attention": "mla"}),
        ("qwen3_235b_a22b", ["model/ffn/balance=[loss_free]"], {"coef": None}),
        ("mixtral_8x22b", ["model.ffn.balance.aux.coef=0.5", "model.vocab_size=32000"], {"coef": 0.5, "vocab": 32000}),
    ],
)
def test_the_command_line_changes_a_preset_that_derives_from_another(
    preset: str, overrides: list[str], changed: dict[str, object]
) -> None:
    own, config = composed(f"model={preset}"), composed(f"model={preset}", *overrides)

    def seen(model: ModelConfig) -> dict[str, object]:
        return {
            "router": model.ffn.router.kind,
            "experts": model.ffn.num_experts,
            "layers": model.layers,
            "attention": model.attention.kind,
            "capacity": model.ffn.capacity.kind,
            "coef": model.ffn.balance.aux and model.ffn.balance.aux.coef,
            "vocab": model.vocab_size,
        }

    assert seen(config) == seen(own) | changed
    assert seen(config) != seen(own)


def test_everything_of_deepseek_v3_is_on_in_its_tiny_relative() -> None:
    tiny, model = composed("model=deepseek_v3_tiny"), composed("model=deepseek_v3")
    for config in (tiny, model):
        assert config.attention.kind == "mla" and config.attention.q_rank and config.attention.yarn
        assert config.ffn.router.kind == "group_limited" and config.ffn.router.top_groups < config.ffn.router.groups
        assert config.ffn.router.scale == 2.5 and config.ffn.router.scores == "sigmoid"
        assert config.ffn.balance.loss_free and config.ffn.balance.aux.scope == "sequence"
        assert config.ffn.balance.aux.coef == 1e-4 and config.ffn.balance.loss_free.freeze_after < 1
        assert config.ffn.num_shared_experts == 1 and config.ffn.first_dense and config.mtp.depth == 1


DOCS = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
LINES = [
    shlex.split(line.replace("$seed", "0").replace("$balance", "loss_free"), comments=True)
    for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [words[words.index("moe_train.train") + 1 :] for words in LINES if "moe_train.train" in words]


def test_the_table_of_the_docs_is_what_the_script_prints(script) -> None:
    printed = script.table()
    assert f"\n\n{printed}\n\n" in DOCS
    assert all(f"| `{name}` |" in printed for name in [*TINY, *PUBLISHED, *CLASSIFIERS])


def test_the_docs_say_of_every_published_model_what_is_covered() -> None:
    (coverage,) = re.findall(r"^\| `model=` \| load balancing.*?\n\n", DOCS, re.DOTALL | re.MULTILINE)
    switch = {name for name in PUBLISHED if name.startswith("switch_base_")}
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in coverage.strip().splitlines()[2:])))
    assert named | switch == set(PUBLISHED)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_of_the_docs_is_a_possible_run(arguments: list[str]) -> None:
    overrides = [argument for argument in arguments if argument not in ("--cfg", "job")]
    assert len(overrides) >= 1
    assert composed(*overrides, "parallel.ep=1")  # there is one rank here


def test_every_key_in_the_docs_exists() -> None:
    keys = set(re.findall(r"`(model\.[a-z_.]+)", DOCS))
    assert len(keys) >= 10
    assert keys <= set(key_paths(TrainConfig))
