"""What a graph-coupled model must not say, with which reason and remedy, and that what it is can be written down."""

from pathlib import Path

import pytest
import yaml

from moe_train.checkpoint.runs import read_config
from moe_train.config.attention import GroupedQueryConfig, LatentConfig, Llama3Config, YarnConfig
from moe_train.config.balance import BalanceConfig, ZLossConfig
from moe_train.config.compose import compose_config, unstated
from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.config.routing import FactorCapacityConfig, SigmoidRouterConfig
from moe_train.config.rules import model_problems, schedule_problems, train_problems
from moe_train.config.schema import DataConfig, TrainConfig
from moe_train.errors import ConfigError, Problem


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def problems(**fields: object) -> list[Problem]:
    """Of a model 24 wide with 4 heads."""
    return list(model_problems(ModelConfig(**{"dim": 24, "heads": 4, **fields})))


def coupled(graph: dict[str, object] | None = None, **ffn: object) -> dict[str, object]:
    """Four experts and a graph."""
    return {"ffn": FFNConfig(**{"num_experts": 4, "graph": GraphConfig(**graph or {}), **ffn})}


LEARNED = {"positions": "learned", "max_positions": 32}
POSSIBLE: dict[str, dict[str, object]] = {
    "networks": coupled(),
    "blocks": coupled({"expert": "block"}),
    "all experts per token, as it is": coupled(top_k=4),
    "one expert": coupled(num_experts=1),
    "one expert that would listen to itself": coupled({"self_edges": True, "max_neighbors": 1}, num_experts=1),
    "no messages": coupled({"max_neighbors": 0}),
    "no messages, without logits": coupled({"max_neighbors": 0, "adjacency": "none"}),
    "all others": coupled({"max_neighbors": 3}),
    "all others, without logits": coupled({"max_neighbors": 3, "adjacency": "none"}),
    "everyone": coupled({"max_neighbors": 4, "self_edges": True, "adjacency": "none"}),
    "the strongest": coupled({"max_neighbors": 2, "adjacency": "softmax"}),
    "dense layers in between": coupled(every=2, first_dense=1),
    "more experts than heads per token": coupled(num_experts=1, top_k=2),
    "learned positions": LEARNED,
    "learned positions with a window": {**LEARNED, "attention": GroupedQueryConfig(window=4)},
    "a bias of a head of its own": {"head_bias": True, "tie_embeddings": False},
    "layer norms": {"norm": "layer"},
}
REFUSALS: dict[str, tuple[dict[str, object], str, str, str]] = {
    "a router": (coupled(router=SigmoidRouterConfig()), "model.ffn.router=set", "every token visits every expert",
                 "leave it out, or set model.ffn.graph=null"),
    "a balance loss": (coupled(balance=BalanceConfig(z_loss=ZLossConfig())), "model.ffn.balance=set",
                       "every token visits every expert", "model.ffn.graph=null"),
    "a capacity": (coupled(capacity=FactorCapacityConfig()), "model.ffn.capacity=set",
                   "every token visits every expert", "model.ffn.graph=null"),
    "shared experts": (coupled(num_shared_experts=1), "model.ffn.num_shared_experts=set",
                       "every token visits every expert", "model.ffn.graph=null"),
    "experts per token": (coupled(top_k=3), "model.ffn.top_k=3", "every token visits every expert", "leave it out"),
    "more sources than others": (coupled({"max_neighbors": 4}), "model.ffn.graph.max_neighbors=4",
                                 "has 3 others to listen to", "lower it, or leave it out for all"),
    "more sources than experts": (coupled({"max_neighbors": 5, "self_edges": True}),
                                  "model.ffn.graph.max_neighbors=5", "has 4 to listen to", "lower it"),
    "nobody else": (coupled({"max_neighbors": 1}, num_experts=1), "model.ffn.graph.max_neighbors=1",
                    "has 0 others to listen to", "lower it"),
    "no strongest": (coupled({"max_neighbors": 2, "adjacency": "none"}), "model.ffn.graph.max_neighbors=2",
                     "no edge is stronger", "model.ffn.graph.adjacency=sigmoid or softmax"),
    "a graph of nobody": (coupled(num_experts=0), "model.ffn.graph=set", "couples experts, and there are none",
                          "set model.ffn.num_experts"),
    "only dense layers": (coupled(first_dense=4), "model.ffn.first_dense=4", "leaves no MoE layer", "lower"),
    "a longest text of rotary positions": ({"max_positions": 32}, "model.max_positions=32", "positions are rotary",
                                           "set model.positions=learned or leave it out"),
    "no longest text": ({"positions": "learned"}, "model.max_positions", "need a longest text",
                        "set it to data.seq_len or more"),
    "learned positions of latent attention": ({**LEARNED, "attention": LatentConfig()}, "model.positions=learned",
                                              "latent attention has rotary positions", "model/attention=gqa"),
    "learned positions, stretched": ({**LEARNED, "attention": GroupedQueryConfig(yarn=YarnConfig())},
                                     "model.attention.yarn=set", "stretches rotary positions",
                                     "set model.positions=rotary"),
    "learned positions, stretched as in Llama 3.1": (
        {**LEARNED, "attention": GroupedQueryConfig(llama3=Llama3Config())}, "model.attention.llama3=set",
        "stretches rotary positions", "set model.positions=rotary"),
    "a bias of the embedding": ({"head_bias": True}, "model.head_bias=True", "needs a head of its own",
                                "set model.tie_embeddings=false"),
}  # fmt: skip


@pytest.mark.parametrize("fields", POSSIBLE.values(), ids=POSSIBLE.keys())
def test_possible(fields: dict[str, object]) -> None:
    assert [str(problem) for problem in problems(**fields)] == []


@pytest.mark.parametrize(("fields", "shown", "rule", "remedy"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused(fields: dict[str, object], shown: str, rule: str, remedy: str) -> None:
    found = problems(**fields)
    assert len(found) == 1, [str(problem) for problem in found]
    assert str(found[0]).partition(": ")[0] == shown
    assert rule in found[0].rule
    assert remedy in found[0].remedy
    assert "\n" not in str(found[0])


def test_all_at_once() -> None:
    fields = {
        "head_bias": True, "positions": "learned",
        **coupled({"max_neighbors": 7}, router=SigmoidRouterConfig(), top_k=3, num_shared_experts=2,
                  balance=BalanceConfig(z_loss=ZLossConfig()), capacity=FactorCapacityConfig()),
    }  # fmt: skip
    assert sorted(problem.key for problem in problems(**fields)) == [
        "model.ffn.balance", "model.ffn.capacity", "model.ffn.graph.max_neighbors", "model.ffn.num_shared_experts",
        "model.ffn.router", "model.ffn.top_k", "model.head_bias", "model.max_positions",
    ]  # fmt: skip


@pytest.mark.parametrize(("seq_len", "refused"), [(31, False), (32, False), (33, True)])
def test_texts_fit_the_learned_positions(seq_len: int, refused: bool) -> None:
    config = TrainConfig(data=DataConfig(seq_len=seq_len), model=ModelConfig(**LEARNED))
    told = [f"model.max_positions=32: is shorter than data.seq_len={seq_len}; raise it, or shorten the texts"]
    assert [str(problem) for problem in schedule_problems(config)] == (told if refused else [])


def composed(*overrides: str) -> TrainConfig:
    return compose_config("train", TrainConfig, train_problems, list(overrides))


def refusals(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_a_graph_of_a_preset_that_routes() -> None:
    """One key of a graph sets one: it says so of each setting that has no meaning then."""
    found = refusals("model=sparse_tiny", "model.ffn.graph.layers=2")
    assert found.keys() == {"model.ffn.router", "model.ffn.balance"}
    for key, told in found.items():
        assert told == (
            f"{key}=set: every token visits every expert: model.ffn.graph is set; "
            "leave it out, or set model.ffn.graph=null"
        )


def test_a_balance_loss_of_a_preset_that_does_not_route() -> None:
    told = refusals("model=graph_tiny", "model/ffn/balance=aux")
    assert told.keys() == {"model/ffn/balance"} and "the chosen preset has no such choice" in told["model/ffn/balance"]
    told = refusals("model=graph_tiny", "+model/ffn/balance=aux")
    assert told.keys() == {"model.ffn.balance"} and "every token visits every expert" in told["model.ffn.balance"]


def test_a_kind_of_experts_is_a_choice() -> None:
    for preset, own, other in (("graph_tiny", "ffn", "block"), ("graph_block_tiny", "block", "ffn")):
        graph = composed(f"model={preset}").model.ffn.graph
        assert graph is not None and graph.expert == own
        changed = composed(f"model={preset}", f"model/ffn/graph={other}").model.ffn.graph
        assert changed == graph.model_copy(update={"expert": other})
    (told,) = refusals("model=sparse_tiny", "model/ffn/graph=ffn").values()
    assert told.startswith("model/ffn/graph: the chosen preset has no such choice; choose another")
    made = composed("model=dense_tiny", "+model/ffn/graph=ffn", "model.ffn.num_experts=4").model.ffn
    assert (made.graph, made.num_experts) == (GraphConfig(), 4)


def test_a_graph_can_be_taken_away() -> None:
    assert composed("model=graph_tiny", "model.ffn.graph=null").model.ffn.graph is None


def test_a_mistyped_key_and_a_wrong_value_are_told() -> None:
    found = refusals("model=graph_tiny", "model.ffn.graph.pool=mean", "model.ffn.graph.adjacency=sigmoidal")
    assert "did you mean model.ffn.graph.pooling?" in found["model.ffn.graph.pool"]
    assert "(did you mean sigmoid?)" in found["model.ffn.graph.adjacency"]
    assert "model.ffn.graph.layers" in refusals("model=graph_tiny", "model.ffn.graph.layers=-1")


def test_the_published_model_reads_its_texts_and_no_longer_ones() -> None:
    assert composed("model=graph_original", "data.seq_len=128").model.max_positions == 128
    assert refusals("model=graph_original", "data.seq_len=129").keys() == {"model.max_positions"}


def test_learned_positions_go_with_multi_token_prediction() -> None:
    """A module sees the tokens of its own positions: those of the model, none beyond the longest text."""
    assert composed("model=graph_original", "data.seq_len=128", "model.mtp.depth=2").model.mtp.depth == 2


@pytest.mark.parametrize("preset", ["graph_tiny", "graph_block_tiny", "graph_original"])
def test_every_key_of_a_graph_is_shown(preset: str) -> None:
    """What ``--cfg job`` adds to Hydra's composition are the keys that the preset leaves to the schema."""
    added = {entry.partition("=")[0].lstrip("+") for entry in unstated("train", TrainConfig, [f"model={preset}"])}
    stated = yaml.safe_load((Path(__file__).parents[3] / "configs/model" / f"{preset}.yaml").read_text())
    said = {"expert", *stated.get("ffn", {}).get("graph", {})}
    assert {f"model.ffn.graph.{key}" for key in GraphConfig.model_fields.keys() - said} <= added


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=graph_tiny", "model.ffn.graph.max_neighbors=2", "model.ffn.graph.recompute=true"],
        ["model=graph_block_tiny", "model.ffn.graph.chunk_tokens=64", "model.ffn.graph.orthogonality=0.1"],
        ["model=graph_original", "data.seq_len=128"],
    ],
)
def test_a_run_reads_its_configuration_back(overrides: list[str], tmp_path: Path) -> None:
    """As resuming, evaluation, generation and export do."""
    config = composed(*overrides)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert read_config(tmp_path) == config
    assert config.model.ffn.graph is not None
