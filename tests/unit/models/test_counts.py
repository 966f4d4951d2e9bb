"""Sizes in closed form against the built module and against what torch counts while it runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import BATCH, VARIANTS, VOCAB, build, config_of, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from moe_train.config.compose import compose_config
from moe_train.config.groups import options_of
from moe_train.config.model import ModelConfig
from moe_train.config.schema import TrainConfig
from moe_train.models import attention, switchhead
from moe_train.models.build import is_moe_layer
from moe_train.models.counts import count
from moe_train.models.sizes import seen_positions
from moe_train.models.transformer import Transformer, build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.graph.record import GraphRecord
from moe_train.ops.attention import causal_attention_reference

EXPERTS = (".experts.gate_up", ".experts.down")
"""In the names of parameters whose dimension 0 runs over the routed experts."""


def built(config: ModelConfig) -> Transformer:
    """The model on the meta device, with the vocabulary of its own or else that of the tests."""
    vocab_size = config.vocab_size or VOCAB
    exchange = LocalExchange(config.ffn.num_experts)
    return build_model(config, vocab_size, exchange, "fp32", torch.device("meta"))


def assert_counted(config: ModelConfig) -> None:
    """Total, MTP's part and both active counts, by the names of the built model's parameters."""
    size, parameters = count(config, VOCAB, seq_len=8), dict(built(config).named_parameters())
    routed = config.ffn.num_experts and config.ffn.graph is None
    unused_share = 1 - config.ffn.top_k / config.ffn.num_experts if routed else 0
    main = {name: p.numel() for name, p in parameters.items() if not name.startswith("mtp.")}
    experts = sum(numel for name, numel in main.items() if any(part in name for part in EXPERTS))
    in_head = sum(numel for name, numel in main.items() if name.startswith("head.experts."))
    heads = sum(numel for name, numel in main.items() if name.endswith(".experts.weight_LNM"))
    idle_heads = 1 - config.attention.top_k / config.attention.experts if heads else 0
    assert size.total == sum(p.numel() for p in parameters.values())
    assert size.mtp == size.total - sum(main.values())
    assert size.main == sum(main.values())
    idle = round(experts * unused_share) + round(heads * idle_heads) + round(in_head * unused_share)
    assert size.active == sum(main.values()) - idle
    embedding = 0 if config.tie_embeddings and not config.classifier else main["embedding_VD"]
    tables = main.get("positions_SD", 0) + main.get("ngrams.table_ND", 0) + main.get("naive_bayes.weight_NC", 0)
    tables += main.get("lexicon.weight_NC", 0)
    assert size.active_without_embedding == size.active - embedding - tables


@pytest.mark.parametrize("preset", options_of("model"))
def test_every_preset(preset: str) -> None:
    classes = ["model.classifier.num_classes=3"] if "classifier" in preset else []
    assert_counted(compose_config("train", TrainConfig, lambda config: [], [f"model={preset}", *classes]).model)


WIDTHS, FEW = st.integers(1, 9), st.integers(0, 2)
ACTIVATIONS = st.sampled_from(["swiglu", "geglu", "gelu", "relu", "swiglu_clamped"])
GROUPED = st.fixed_dictionaries(
    {
        "kind": st.just("gqa"),
        "kv_heads": st.sampled_from([None, 1, 2]),
        "head_dim": st.sampled_from([None, 2, 6]),
        "qkv_bias": st.booleans(),
        "out_bias": st.booleans(),
        "qk_norm": st.sampled_from(["none", "head", "full"]),
        "window": st.sampled_from([None, 3]),
        "full_every": st.sampled_from([None, 2]),
        "sinks": st.booleans(),
    }
)
LATENT = st.fixed_dictionaries(
    {
        "kind": st.just("mla"),
        "q_rank": st.sampled_from([None, 5]),
        "kv_rank": WIDTHS,
        "nope_dim": WIDTHS,
        "rope_dim": st.sampled_from([2, 4]),
        "v_dim": WIDTHS,
    }
)
WITH_EXPERTS = st.fixed_dictionaries(
    {
        "kind": st.just("switchhead"),
        "head_dim": st.sampled_from([None, 2, 6]),
        "experts": st.integers(2, 5),
        "top_k": st.integers(1, 2),
    }
)
ROUTERS = st.one_of(
    st.sampled_from(["topk", "sigmoid", "noisy_topk", "hash", "sinkhorn"]).map(lambda kind: {"kind": kind}),
    st.booleans().map(lambda bias: {"kind": "topk_softmax", "bias": bias}),
    st.sampled_from([1, 2]).map(lambda groups: {"kind": "hierarchical", "groups": groups}),
)
GRAPHS = st.fixed_dictionaries(
    {
        "expert": st.sampled_from(["ffn", "block"]),
        "layers": FEW,
        "adjacency": st.sampled_from(["sigmoid", "softmax", "none"]),
        "similarity": st.sampled_from(["gate", "cosine", "dot"]),
        "max_neighbors": st.none() | FEW,
        "pooling": st.sampled_from(["mean", "attention", "weighted"]),
        "combiner": st.sampled_from(["none", "linear", "gelu_norm"]),
    }
)
FFNS = st.fixed_dictionaries(
    {
        "hidden_dim": WIDTHS,
        "activation": ACTIVATIONS,
        "num_experts": st.sampled_from([0, 2, 4, 6]),
        "top_k": st.integers(1, 2),
        "expert_dim": WIDTHS,
        "expert_activation": st.none() | ACTIVATIONS,
        "expert_bias": st.booleans(),
        "num_shared_experts": FEW,
        "shared_dim": st.none() | WIDTHS,
        "shared_gate": st.booleans(),
        "every": st.integers(1, 3),
        "first_dense": FEW,
        "router": ROUTERS,
        "balance": st.sampled_from([{}, {"aux": {}}]),
        "graph": st.none() | GRAPHS,
    }
)
MODELS_WITHOUT_HEAD = st.fixed_dictionaries(
    {
        "dim": st.sampled_from([8, 16]),
        "layers": st.integers(1, 5),
        "heads": st.sampled_from([2, 4]),
        "vocab_size": st.sampled_from([None, 40]),
        "norm": st.sampled_from(["rms", "layer"]),
        "max_positions": st.sampled_from([None, 9]),
        "attention": GROUPED | LATENT | WITH_EXPERTS,
        "ffn": FFNS,
        "mtp": st.fixed_dictionaries({"depth": FEW}),
    }
)
HEADS = st.sampled_from(
    [{"tie_embeddings": True}, {"tie_embeddings": False}, {"tie_embeddings": False, "head_bias": True}]
)


def is_possible(config: ModelConfig) -> bool:
    """Blocks that a graph couples have no experts in their attention."""
    graph = config.ffn.graph
    return config.attention.kind != "switchhead" or graph is None or graph.expert == "ffn"


MODELS = st.builds(lambda model, head: ModelConfig.model_validate(model | head), MODELS_WITHOUT_HEAD, HEADS)


@settings(max_examples=200, deadline=None)
@given(MODELS.filter(is_possible))
def test_any_model(config: ModelConfig) -> None:
    assert_counted(config)


def test_the_vocabulary_of_the_model_comes_before_that_of_the_tokenizer() -> None:
    own, tokenizers = config_of("model.vocab_size=40"), config_of()
    assert count(own, VOCAB, 8) == count(tokenizers, 40, 8) != count(tokenizers, VOCAB, 8)


def test_a_bias_of_loss_free_balancing_is_no_parameter() -> None:
    config = config_of("model/ffn/router=sigmoid", "model/ffn/balance=[loss_free]")
    assert any(name.endswith("router.bias_E") for name, _ in built(config).named_buffers())
    assert count(config, VOCAB, 8) == count(config_of("model/ffn/router=sigmoid", "model/ffn/balance=[]"), VOCAB, 8)


@given(st.integers(1, 30), st.none() | st.integers(1, 40))
def test_seen_positions_are_those_of_the_mask(seq_len: int, window: int | None) -> None:
    seen = sum(1 for i in range(seq_len) for j in range(seq_len) if 0 <= i - j < (window or seq_len))
    assert seen_positions(seq_len, window) == seen


def changed(**sections: object) -> ModelConfig:
    """The small model with other attention, and other keys of its remaining sections."""
    small = config_of().model_dump()
    ffn = small["ffn"] | sections.pop("ffn", {})
    return ModelConfig.model_validate(small | sections | {"ffn": ffn})


LATENT_SMALL = {"kind": "mla", "kv_rank": 7, "nope_dim": 5, "rope_dim": 2, "v_dim": 3}
MECHANISMS = {
    "as gpt-oss": changed(
        attention={"kind": "gqa", "head_dim": 6, "window": 3, "full_every": 2, "qkv_bias": True, "qk_norm": "full"},
        ffn={"activation": "swiglu_clamped", "expert_bias": True, "compute": "reference"},
    ),  # biases are added: otherwise each is a product with ones, which torch counts
    "a window in every layer": changed(attention={"kind": "gqa", "kv_heads": 2, "window": 5}),
    "experts without gate": changed(ffn={"activation": "geglu", "expert_activation": "gelu", "first_dense": 1}),
    "a gate of shared experts": changed(ffn={"num_shared_experts": 1, "shared_dim": 7, "shared_gate": True}),
    "latent": changed(attention=LATENT_SMALL | {"q_rank": 9}),
    "experts in attention": changed(attention={"kind": "switchhead", "head_dim": 6, "experts": 5, "top_k": 3}),
    "experts in attention alone": changed(
        attention={"kind": "switchhead", "experts": 3}, ffn={"num_experts": 0}, tie_embeddings=False
    ),
    "latent, queries not compressed, two modules": changed(
        attention=LATENT_SMALL, mtp={"depth": 2}, ffn={"every": 2}, tie_embeddings=False
    ),
}
"""Beside the variants of every test: what changes the operations."""
CONFIGS = {name: config_of(*VARIANTS[name]) for name in VARIANTS if name != "capacity"} | MECHANISMS


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_flops_of_the_forward_pass(variant: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain attention multiplies only what a token sees, so that torch counts what the closed form does.

    Under a capacity limit the closed form is an upper bound; what is dropped is not known from the configuration. Nor
    does it know that positions without a target, at the end of a sequence, go to no expert of a module.
    """
    config = CONFIGS[variant]
    model, tokens_BS = build(config).train(training), random_tokens()
    for module in (attention, switchhead):
        monkeypatch.setattr(module, "causal_attention", causal_attention_reference)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    size = count(config, VOCAB, tokens_BS.shape[1])
    per_token = size.forward_flops_per_token + (size.mtp_flops_per_token if training else 0)
    ends = [BATCH * (k + 1) for k in range(config.mtp.depth) if is_moe_layer(config.ffn, config.layers + k)]
    expert = 2 * 3 * config.dim * config.ffn.expert_dim
    left_out = sum(ends) * config.ffn.top_k * expert if training else 0
    assert counter.get_total_flops() == per_token * tokens_BS.numel() - left_out


GRAPHED = {
    "networks": {},
    "blocks": {"expert": "block"},
    "no graph layers": {"layers": 0},
    "no messages": {"layers": 3, "max_neighbors": 0},
    "cosines, a query": {"expert": "block", "similarity": "cosine", "pooling": "attention"},
    "products, learned weights, as the original": {"similarity": "dot", "pooling": "weighted", "combiner": "gelu_norm"},
    "without logits, a map": {"adjacency": "none", "layers": 1, "combiner": "linear"},
}
"""Kinds of graph-coupled layers."""


def graphed(self_edges: bool = True, **graph: object) -> ModelConfig:
    """The small model with graph-coupled experts, in one of its two layers."""
    graph = {"self_edges": self_edges} | graph
    return changed(ffn={"graph": graph, "every": 2, "router": {"kind": "topk"}, "balance": {}}, mtp={"depth": 1})


def flops_of_torch(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """What torch counts in a forward pass in evaluation; what only serves to look at the experts is left out."""
    model, tokens_BS = build(config).eval(), random_tokens()
    monkeypatch.setattr(attention, "causal_attention", causal_attention_reference)
    monkeypatch.setattr(GraphRecord, "of", staticmethod(lambda *sums: None))
    with FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    return counter.get_total_flops()


@pytest.mark.parametrize("graph", GRAPHED.values(), ids=GRAPHED.keys())
def test_flops_of_a_graph(graph: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not count products of a matrix and a vector: it leaves out the scores of a learned query, E·D."""
    config = graphed(**graph)
    size, tokens = count(config, VOCAB, seq_len=8), random_tokens().numel()
    queries = config.ffn.num_experts * config.dim if graph.get("pooling") == "attention" else 0
    found = flops_of_torch(config, monkeypatch)
    assert found == (size.forward_flops_per_token - 2 * queries) * tokens


@pytest.mark.parametrize(("num_sources", "graph"), [(3, {}), (2, {"max_neighbors": 2})])
def test_flops_of_edges_that_are_left_out(
    num_sources: int, graph: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed form counts the edges there are; one product with all experts multiplies zeros for the others, too."""
    config = graphed(self_edges=False, layers=2, **graph)
    size, tokens = count(config, VOCAB, seq_len=8), random_tokens().numel()
    zeros = 2 * 4 * (4 - num_sources) * 2 * config.dim
    found = flops_of_torch(config, monkeypatch)
    assert found in {(size.forward_flops_per_token + extra) * tokens for extra in (0, zeros)}


def test_backward_costs_twice_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("model.mtp.depth=1", "model.ffn.every=2")  # the module's block is dense
    model, tokens_BS = build(config), random_tokens()
    monkeypatch.setattr(attention, "causal_attention", causal_attention_reference)
    with FlopCounterMode(display=False) as forward:
        output = model(tokens_BS)
    with FlopCounterMode(display=False) as backward:
        (output.logits_BSV.sum() + output.mtp_logits[0].sum()).backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    size = count(config, VOCAB, seq_len=8)
    assert size.training_flops_per_token == 3 * (size.forward_flops_per_token + size.mtp_flops_per_token)
    assert size.training_flops_per_token * tokens_BS.numel() == 3 * forward.get_total_flops()
