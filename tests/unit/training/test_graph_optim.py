"""What a layer of dense experts starts with, and what of it decays."""

import itertools

import pytest
import torch
from layouts import Case

from moe_train.config.graph import GraphConfig
from moe_train.config.schema import OptimConfig
from moe_train.models.initialise import initialise
from moe_train.moe.graph.adjacency import Adjacency
from moe_train.moe.roles import Kind, Role, roles_of
from moe_train.training.optim import build_optimizer

G = "model.ffn.graph"
BIASED = ("model.attention.qkv_bias=true", "model.attention.out_bias=true", "model.ffn.expert_bias=true")
MODELS = {
    "ffn": ("model=graph_tiny", "model.ffn.expert_bias=true", f"{G}.pooling=attention", f"{G}.combiner=gelu_norm"),
    "block": (
        "model=graph_block_tiny", *BIASED, "model.norm=layer", "model.positions=learned", "model.max_positions=32",
        "model.tie_embeddings=false", "model.head_bias=true", "model.attention.sinks=true", f"{G}.pooling=weighted",
        f"{G}.combiner=linear",
    ),
}  # fmt: skip
MATRICES = {
    "embedding_VD", "positions_SD", "qkv.weight", "out.weight", "gate_up_LDF2", "down_LFD", "gate_up.weight",
    "down.weight", "own.weight", "map.weight", "pair.weight", "head.weight",
}  # fmt: skip
RESTING = {"logits_EE"}
"""Matrices that do not decay: half of every edge is no rest."""
EACH_MODEL = pytest.mark.parametrize("words", MODELS.values(), ids=MODELS)


@EACH_MODEL
def test_every_parameter_is_in_one_group_of_its_kind_and_decay(words: tuple[str, ...]) -> None:
    """Vectors do not decay, of stacked experts neither; nor does the graph."""
    model = Case("graph", words).whole_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            is_matrix = any(name.endswith(end) for end in MATRICES)
            assert group["weight_decay"] == (0.3 if is_matrix else 0.0), name
            assert group["name"] == ("expert" if ".experts." in name else "dense"), name
            seen.update(end for end in MATRICES | RESTING if name.endswith(end))
    assert names == {}
    assert seen >= RESTING


def test_the_two_models_have_every_matrix_there_is() -> None:
    found = {
        name
        for words in MODELS.values()
        for name, parameter in Case("graph", words).whole_model().named_parameters()
        if parameter.dim() - (".experts." in name) > 1
    }
    ends = MATRICES | RESTING
    assert {name for name in found if not any(name.endswith(end) for end in ends)} == set()
    assert {end for end in ends if not any(name.endswith(end) for name in found)} == set()


def test_a_step_without_gradients_moves_no_edge() -> None:
    """Decay alone: matrices shrink, the logits of the graph stay."""
    model = Case("graph", MODELS["ffn"]).whole_model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_matrix = any(name.endswith(end) for end in MATRICES)
        expected = before[name] * (0.95 if is_matrix else 1.0)
        assert torch.allclose(parameter, expected, rtol=1e-6, atol=0), name


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.5), (-4.0, 0.0)])
def test_logits_start_around_their_mean(mean: float, std: float) -> None:
    graph = Adjacency(60, GraphConfig(adjacency_mean=mean, adjacency_std=std))
    initialise(graph, seed=1)
    assert graph.logits_EE.mean().item() == pytest.approx(mean, abs=5 * std / 60)
    assert graph.logits_EE.std().item() == pytest.approx(std, rel=0.1, abs=1e-6)


def test_the_role_of_the_graph() -> None:
    graph = Adjacency(4, GraphConfig(adjacency_mean=0.5, adjacency_std=2.0))
    assert roles_of(graph) == {"logits_EE": Role(Kind.DENSE, 2.0, mean=0.5, decays=False)}
    assert roles_of(Adjacency(4, GraphConfig(adjacency="none"))) == {}


def test_layers_start_with_graphs_of_their_own() -> None:
    """Whose values depend on the seed and the place alone."""
    words = ("model=graph_tiny",)
    logits = [
        parameter
        for model in (Case("graph", words).whole_model(), Case("graph", words).whole_model())
        for name, parameter in model.named_parameters()
        if name.endswith("logits_EE")
    ]
    half = len(logits) // 2
    assert half >= 2
    assert all(torch.equal(a, b) for a, b in zip(logits[:half], logits[half:], strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(logits[:half], 2))
