"""Which sizes and mechanisms of a model do not go together, with which reason and remedy."""

import pytest

from moe_train.config.attention import GroupedQueryConfig, LatentConfig, Llama3Config, SwitchHeadConfig, YarnConfig
from moe_train.config.compose import compose_config
from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig, MTPConfig
from moe_train.config.rules import embedding_rows, model_problems, schedule_problems, train_problems
from moe_train.config.schema import DataConfig, TrainConfig
from moe_train.errors import ConfigError, Problem


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def problems(**fields: object) -> list[Problem]:
    """Of a model 24 wide with 4 heads."""
    return list(model_problems(ModelConfig(**{"dim": 24, "heads": 4, **fields})))


def with_ffn(**fields: object) -> dict[str, object]:
    return {"ffn": FFNConfig(**{"num_experts": 8, **fields})}


def grouped(**fields: object) -> dict[str, object]:
    return {"attention": GroupedQueryConfig(**fields)}


POSSIBLE: dict[str, dict[str, object]] = {
    "the defaults": {},
    "heads as wide as stated": {"dim": 25, "heads": 3, **grouped(head_dim=4)},
    "shared key heads": grouped(kv_heads=2),
    "a window in all layers": grouped(window=3),
    "a window in every other layer": grouped(window=3, full_every=2),
    "YaRN": grouped(yarn=YarnConfig()),
    "YaRN with another magnitude": grouped(yarn=YarnConfig(mscale=0.7)),
    "latent attention of any width": {"dim": 25, "heads": 3, "attention": LatentConfig(nope_dim=5, v_dim=7)},
    "experts in attention": {"attention": SwitchHeadConfig(experts=3, top_k=3)},
    "experts in attention, of any width, with learned positions": {
        "dim": 25,
        "attention": SwitchHeadConfig(head_dim=4),
        "positions": "learned",
        "max_positions": 2048,
    },
    "scaled scores of latent attention": {"attention": LatentConfig(yarn=YarnConfig(mscale_all_dim=1.0))},
    "all but the last layer dense": {"layers": 4, **with_ffn(first_dense=3)},
    "dense layers first, then every other": {"layers": 4, **with_ffn(first_dense=3, every=2)},
    "shared experts of their own width, gated": with_ffn(num_shared_experts=2, shared_dim=5, shared_gate=True),
    "keys of experts in a dense model": {"ffn": FFNConfig(shared_gate=True, first_dense=9)},
    "an architecture from a folder": {"adopt": True, "init_from": "x"},
}
REFUSALS: dict[str, tuple[dict[str, object], str, str, str]] = {
    "heads do not divide": ({"heads": 5}, "model.heads=5", "must divide model.dim=24", "set model.attention.head_dim"),
    "odd width of a head": ({"heads": 8}, "model.heads=8", "an even head width, not 3", "change model.dim"),
    "odd stated width": (grouped(head_dim=5), "attention.head_dim=5", "an even head width, not 5", "head_dim"),
    "odd width of a head with experts": (
        {"heads": 8, "attention": SwitchHeadConfig()}, "model.heads=8", "an even head width, not 3", "change model.dim"
    ),
    "more choices than a head has experts": (
        {"attention": SwitchHeadConfig(experts=3, top_k=4)}, "model.attention.top_k=4",
        "must not exceed model.attention.experts=3", "raise model.attention.experts",
    ),
    "scores of other attention than that with experts": (
        {"attention": SwitchHeadConfig(yarn=YarnConfig(mscale_all_dim=0.5))}, "attention.yarn.mscale_all_dim=0.5",
        "latent attention only", "model/attention=mla",
    ),
    "experts in the attention of coupled blocks": (
        {"attention": SwitchHeadConfig(), **with_ffn(graph=GraphConfig(expert="block"))},
        "model.attention.kind=switchhead", "model.ffn.graph.expert=block", "model/attention=gqa",
    ),
    "key heads do not divide": (grouped(kv_heads=3), "attention.kv_heads=3", "must divide model.heads=4", "change one"),
    "exceptions from no window": (
        grouped(full_every=2), "attention.full_every=2", "no window, and there is none", "set model.attention.window"
    ),
    "scores of other attention": (
        grouped(yarn=YarnConfig(mscale_all_dim=0.5)), "attention.yarn.mscale_all_dim=0.5", "latent attention only",
        "model/attention=mla",
    ),
    "no frequencies to blend": (
        {"attention": LatentConfig(yarn=YarnConfig(beta_fast=1.0, beta_slow=32.0))},
        "attention.yarn.beta_fast=1.0", "must exceed beta_slow=32.0", "lower beta_slow",
    ),
    "no frequencies to blend, as in Llama 3.1": (
        {"attention": LatentConfig(llama3=Llama3Config(high_freq_factor=1.0))},
        "attention.llama3.high_freq_factor=1.0", "must exceed low_freq_factor=1.0", "raise it",
    ),
    "stretched twice": (
        grouped(yarn=YarnConfig(), llama3=Llama3Config()), "model.attention.llama3", "by yarn already", "leave one out"
    ),
    "odd rotary width": ({"attention": LatentConfig(rope_dim=3)}, "attention.rope_dim=3", "must be even", "another"),
    "all layers dense first": ({"layers": 4, **with_ffn(first_dense=4)}, "ffn.first_dense=4", "no MoE layer", "lower"),
    "no expert after the dense layers": (
        {"layers": 5, **with_ffn(first_dense=4, every=2)}, "ffn.first_dense=4", "among model.layers=5", "lower"
    ),
    "too few layers": ({"layers": 4, **with_ffn(every=5)}, "ffn.every=5", "no MoE layer among model.layers=4", "lower"),
    "width of no shared expert": (with_ffn(shared_dim=5), "ffn.shared_dim=5", "there are none", "num_shared_experts"),
    "gate of none": (with_ffn(shared_gate=True), "ffn.shared_gate=True", "there are none", "num_shared_experts"),
    "an architecture from nowhere": ({"adopt": True}, "model.adopt=True", "take the architecture", "init_from=DIR"),
    "routing": (with_ffn(top_k=9), "ffn.top_k=9", "must not exceed model.ffn.num_experts=8", "lower"),
}  # fmt: skip


@pytest.mark.parametrize("fields", POSSIBLE.values(), ids=POSSIBLE.keys())
def test_possible(fields: dict[str, object]) -> None:
    assert [str(problem) for problem in problems(**fields)] == []


@pytest.mark.parametrize(("fields", "shown", "rule", "remedy"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused(fields: dict[str, object], shown: str, rule: str, remedy: str) -> None:
    found = problems(**fields)
    assert len(found) == 1, [str(problem) for problem in found]
    assert found[0].key.startswith("model.")
    assert str(found[0]).partition(": ")[0].endswith(shown)
    assert rule in found[0].rule
    assert remedy in found[0].remedy
    assert "\n" not in str(found[0])


def test_all_at_once() -> None:
    fields = {
        "heads": 7, "adopt": True, "layers": 4,
        **grouped(kv_heads=3, full_every=2, yarn=YarnConfig(mscale_all_dim=1.0)),
        **with_ffn(first_dense=4, shared_gate=True, shared_dim=3, top_k=9),
    }  # fmt: skip
    assert sorted(problem.key for problem in problems(**fields)) == [
        "model.adopt", "model.attention.full_every", "model.attention.kv_heads", "model.attention.yarn.mscale_all_dim",
        "model.ffn.first_dense", "model.ffn.shared_dim", "model.ffn.shared_gate", "model.ffn.top_k", "model.heads",
    ]  # fmt: skip


@pytest.mark.parametrize(("depth", "refused"), [(0, False), (3, False), (4, True), (9, True)])
def test_multi_token_prediction_must_find_a_token(depth: int, refused: bool) -> None:
    """Of 4 labels the last module must have one left."""
    config = TrainConfig(data=DataConfig(seq_len=4), model=ModelConfig(mtp=MTPConfig(depth=depth)))
    found = [problem for problem in schedule_problems(config) if problem.key == "model.mtp.depth"]
    assert [str(problem) for problem in found] == (
        [f"model.mtp.depth={depth}: looks further ahead than data.seq_len=4; lower it"] if refused else []
    )


def test_rows_of_the_embedding() -> None:
    assert embedding_rows(ModelConfig(), 300) == 300
    assert embedding_rows(ModelConfig(vocab_size=300), 300) == 300
    assert embedding_rows(ModelConfig(vocab_size=512), 300) == 512
    with pytest.raises(ConfigError, match=r"model\.vocab_size=299: the tokenizer has 300 tokens; raise it"):
        embedding_rows(ModelConfig(vocab_size=299), 300)


OUT_OF_BOUNDS = {
    "model.attention.yarn.factor=1.0": "should be greater than 1",
    "model.attention.yarn.mscale=-1": "should be greater than or equal to 0",
    "model.attention.yarn.mscale_all_dim=-1": "should be greater than or equal to 0",
    "model.attention.yarn.original_length=0": "should be greater than 0",
    "model.attention.yarn.truncate=2": "should be a valid boolean",
    "model.attention.rope_theta=1": "should be greater than 1",
    "model.attention.window=0": "should be greater than 0",
    "model.attention.full_every=0": "should be greater than 0",
    "model.attention.head_dim=0": "should be greater than 0",
    "model.attention.qk_norm=layer": "must be one of 'none', 'head' or 'full'",
    "model.attention.sinks=maybe": "should be a valid boolean",
    "model.ffn.activation=silu": "must be one of 'swiglu', 'geglu', 'gelu', 'relu' or 'swiglu_clamped'",
    "model.ffn.expert_activation=swigloo": "must be one of 'swiglu'",
    "model.ffn.shared_dim=0": "should be greater than 0",
    "model.ffn.first_dense=-1": "should be greater than or equal to 0",
    "model.mtp.depth=-1": "should be greater than or equal to 0",
    "model.mtp.coef=-0.1": "should be greater than or equal to 0",
    "model.mtp.late_after=1.5": "should be less than or equal to 1",
    "model.vocab_size=0": "should be greater than 0",
    "model.upcycle.noise=-1": "should be greater than or equal to 0",
    "model.attention.kind=mqa": "must be one of 'gqa', 'mla'",
    "model.attention.kv_rank=8": "does not apply to kind=",
    "model.attention.sink=true": "did you mean model.attention.sinks?",
    "model.ffn.balance.loss_free.freeze_after=0": "should be greater than 0",
}


@pytest.mark.parametrize(("override", "message"), OUT_OF_BOUNDS.items())
def test_values_out_of_bounds(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config("train", TrainConfig, train_problems, [override])
    key = override.partition("=")[0]
    assert [problem.key for problem in error.value.problems] == [key]
    assert message in str(error.value.problems[0])


def test_what_a_kind_of_attention_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention\.window=3: does not apply to kind=mla"):
        compose_config("train", TrainConfig, train_problems, ["model.attention.kind=mla", "model.attention.window=3"])


@pytest.mark.parametrize("choice", ["model/attention=mla", "model.attention.kind=mla"])
def test_a_preset_may_be_given_latent_attention(choice: str) -> None:
    """Its key heads, which that has not, are left behind."""
    config = compose_config("train", TrainConfig, train_problems, [choice, "model.attention.q_rank=32"])
    assert config.model.attention == LatentConfig(q_rank=32)


def test_a_field_switches_yarn_on() -> None:
    config = compose_config("train", TrainConfig, train_problems, ["model.attention.yarn.factor=8.0"])
    assert config.model.attention.yarn == YarnConfig(factor=8.0)


def test_a_choice_that_a_preset_has_no_place_for_is_told_from_an_unknown_one() -> None:
    """The list of options used to be offered, with the chosen one in it."""
    with pytest.raises(ConfigError, match=r"write \+model/attention="):
        compose_config("train", TrainConfig, lambda config: [], ["model=pretrained", "model/attention=mla"])
    with pytest.raises(ConfigError, match=r"choose one of gqa, mla"):
        compose_config("train", TrainConfig, lambda config: [], ["model/attention=mha"])
