"""The public graph-coupled layers: they are the trainer's, and have the original's sizes; bad arguments are named."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train import ExpertGraphConv, GraphCoupledMoE
from moe_train.config.attention import GroupedQueryConfig
from moe_train.config.graph import GraphConfig
from moe_train.config.model import FFNConfig, ModelConfig
from moe_train.errors import ConfigError
from moe_train.models.blocks import CoupledBlocks
from moe_train.models.build import build_block
from moe_train.moe.exchange import LocalExchange

DIM, E = 8, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens() -> Tensor:
    return torch.randn(2, 5, DIM, dtype=torch.float64)


def held() -> Tensor:
    return torch.randn(2, 5, E, DIM, dtype=torch.float64)


def filled(layer: nn.Module) -> nn.Module:
    """In fp64, with normal numbers for all parameters: none is zero, one or small."""
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def test_constructors_are_as_documented() -> None:
    def given(layer: type[nn.Module]) -> str:
        parameters = inspect.signature(layer).parameters.values()
        return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)

    edges = (
        "adjacency='sigmoid', similarity='gate', normalize='none', prenorm=False, self_edges=False, max_neighbors=None"
    )
    assert given(ExpertGraphConv) == f"dim, num_experts, {edges}"
    assert given(GraphCoupledMoE) == (
        "dim, num_experts=4, expert_dim=None, expert='ffn', num_heads=None, gnn_layers=2, "
        f"{edges}, pooling='mean', combiner='gelu_norm', activation='gelu', orthogonality_loss_coef=0.0"
    )


def test_what_is_not_said_is_as_in_the_trainer() -> None:
    """But for the combiner, which is the original's here."""
    stated = GraphCoupledMoE(DIM).moe.config
    assert stated.model_copy(update={"combiner": "none"}) == GraphConfig()
    assert ExpertGraphConv(DIM, E).conv.messages.adjacency.config == GraphConfig()


@pytest.mark.parametrize("self_edges", [False, True])
def test_a_convolution_is_the_formula(self_edges: bool) -> None:
    """By loops over experts: sigmoid edges, a gate on the pair, sums of messages, a residual."""
    conv = filled(ExpertGraphConv(DIM, E, self_edges=self_edges))
    h_BSED, messages = held(), conv.conv.messages
    gate, logits_EE = messages.similarity.pair, messages.adjacency.logits_EE
    expected = torch.empty_like(h_BSED)
    for i in range(E):
        m_BSD = torch.zeros(2, 5, DIM, dtype=torch.float64)
        for j in range(E):
            if j != i or self_edges:
                pair = torch.cat([h_BSED[:, :, i], h_BSED[:, :, j]], dim=-1)
                m_BSD += logits_EE[i, j].sigmoid() * F.linear(pair, gate.weight, gate.bias).sigmoid() * h_BSED[:, :, j]
        expected[:, :, i] = h_BSED[:, :, i] + F.gelu(messages.map(m_BSD) + conv.conv.own(h_BSED[:, :, i]))
    torch.testing.assert_close(conv(h_BSED), expected, rtol=1e-12, atol=1e-12)


def test_the_adjacency_is_that_of_the_messages() -> None:
    conv = ExpertGraphConv(DIM, E, adjacency="softmax", max_neighbors=2)
    assert ((conv.adjacency > 0).sum(dim=1) == 2).all() and (conv.adjacency.diagonal() == 0).all()
    torch.testing.assert_close(conv.adjacency.sum(dim=1), torch.ones(E))
    assert torch.equal(ExpertGraphConv(DIM, E, max_neighbors=0).adjacency, torch.zeros(E, E))


def test_what_an_expert_learns_depends_on_its_edges() -> None:
    """Gradients reach logits, gate and both maps; without edges no expert depends on another."""
    conv, h_BSED = filled(ExpertGraphConv(DIM, E)), held().requires_grad_()
    conv(h_BSED).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in conv.parameters())
    with torch.no_grad():
        conv.conv.messages.adjacency.logits_EE.fill_(float("-inf"))
    (alone,) = torch.autograd.grad(conv(h_BSED)[:, :, 0].sum(), h_BSED)
    assert (alone[:, :, 1:] == 0).all() and (alone[:, :, 0] != 0).any()


def trainers(expert: str, graph: dict[str, object]) -> nn.Module:
    """The layer with experts of the first block of a model with the original's norms and biases."""
    ffn = {"num_experts": E, "expert_dim": 12, "expert_activation": "relu", "expert_bias": True}
    config = ModelConfig(
        dim=DIM, heads=2, norm="layer", attention=GroupedQueryConfig(qkv_bias=True, out_bias=True),
        ffn=FFNConfig(graph=GraphConfig(expert=expert, **graph), **ffn),
    )  # fmt: skip
    block = build_block(config, 0, LocalExchange(E))
    return block.layer if isinstance(block, CoupledBlocks) else block.ffn


@pytest.mark.parametrize("expert", ["ffn", "block"])
@pytest.mark.parametrize(
    "graph",
    [
        {"combiner": "gelu_norm"},
        {"layers": 1, "adjacency": "softmax", "normalize": "degree", "pooling": "attention", "combiner": "linear"},
        {"layers": 3, "similarity": "cosine", "max_neighbors": 1, "pooling": "weighted", "combiner": "none"},
        {"similarity": "dot", "normalize": "count", "self_edges": True, "combiner": "gelu_norm"},
        {"layers": 0, "max_neighbors": 0},
    ],
)
def test_it_is_the_layer_of_the_models(expert: str, graph: dict[str, object]) -> None:
    """Same weights, same numbers as the trainer's own layer of that configuration."""
    arguments = {"combiner": "none"} | graph
    arguments["gnn_layers"] = arguments.pop("layers", 2)
    heads = 2 if expert == "block" else None
    public = filled(GraphCoupledMoE(DIM, E, 12, expert, heads, activation="relu", **arguments))
    inner = trainers(expert, graph).double()
    inner.load_state_dict(public.moe.state_dict())
    x_BSD = tokens()
    assert torch.equal(public(x_BSD)[0], inner(x_BSD).y_BSD)


@pytest.mark.parametrize(("dim", "experts", "graph_layers"), [(256, 4, 2), (384, 4, 3), (512, 2, 1)])
def test_of_blocks_it_has_the_parameters_of_a_layer_of_the_original(dim: int, experts: int, graph_layers: int) -> None:
    """By hand, as in the golden test of the published counts."""
    block = (3 * dim**2 + 3 * dim) + (dim**2 + dim) + 4 * dim + (4 * dim**2 + 4 * dim) + (4 * dim**2 + dim)
    graph_layer, combiner = 2 * (dim**2 + dim) + (2 * dim + 1) + experts**2, dim**2 + dim + 2 * dim
    with torch.device("meta"):
        layer = GraphCoupledMoE(dim, experts, expert="block", gnn_layers=graph_layers)
    assert size(layer) == experts * block + graph_layers * graph_layer + combiner
    assert layer.moe.experts.block.attention.heads == dim // 64


def test_the_width_is_four_times_the_outer_and_there_is_a_head_at_least() -> None:
    assert GraphCoupledMoE(DIM).moe.experts.down_LFD.shape == (4, 4 * DIM, DIM)
    assert GraphCoupledMoE(DIM, expert_dim=5).moe.experts.down_LFD.shape == (4, 5, DIM)
    assert GraphCoupledMoE(DIM, expert="block").moe.experts.block.attention.heads == 1
    assert GraphCoupledMoE(DIM, expert="block", num_heads=4).moe.experts.block.attention.heads == 4


@pytest.mark.parametrize("expert", ["ffn", "block"])
def test_no_token_sees_a_later_one(expert: str) -> None:
    layer, x_BSD = filled(GraphCoupledMoE(DIM, E, 12, expert)), tokens()
    changed_BSD = x_BSD.clone()
    changed_BSD[:, 3] += 1.0
    same_BS = (layer(x_BSD)[0] == layer(changed_BSD)[0]).all(dim=-1)
    assert same_BS[:, :3].all() and not same_BS[:, 3].any()
    assert same_BS[:, 4].all() == (expert == "ffn"), "only blocks have attention"


def test_the_loss_is_the_weighted_mean_squared_cosine_of_what_experts_add() -> None:
    layer, x_BSD = filled(GraphCoupledMoE(DIM, E, 12, orthogonality_loss_coef=0.5)), tokens()
    added_TED = layer.moe.experts(x_BSD).flatten(0, 1)
    cosines = F.cosine_similarity(added_TED.unsqueeze(1), added_TED.unsqueeze(2), dim=-1)
    pairs = ~torch.eye(E, dtype=torch.bool)
    expected = 0.5 * cosines[:, pairs].square().mean()
    found = layer(x_BSD)[1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert found.requires_grad and layer.eval()(x_BSD)[1].item() == 0.0


def test_without_a_weight_there_is_no_loss() -> None:
    assert filled(GraphCoupledMoE(DIM))(tokens())[1].item() == 0.0


def test_initial_values_are_the_originals() -> None:
    """Linear maps N(0, 0.02), no biases, edges drawn widely."""
    layer = GraphCoupledMoE(64, 16, expert="block")
    values = dict(layer.named_parameters())
    logits = torch.stack([p for name, p in values.items() if name.endswith("logits_EE")])
    assert logits.shape == (2, 16, 16) and logits.std().item() == pytest.approx(1.0, abs=0.2)
    assert not any(p.any() for name, p in values.items() if name.endswith("bias"))
    for name, parameter in values.items():
        if name.endswith("weight") and "norm" not in name and "similarity" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arguments", [{}, {"adjacency": "none", "similarity": "cosine"}, {"max_neighbors": 1}])
def test_a_convolution_keeps_shape_and_dtype(dtype: torch.dtype, arguments: dict[str, object]) -> None:
    h_BSED = held().to(dtype)
    conv = ExpertGraphConv(DIM, E, **arguments)
    assert conv(h_BSED).shape == h_BSED.shape and conv(h_BSED).dtype == dtype
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in ExpertGraphConv(DIM, E, **arguments).parameters())


def test_manual_seed_governs_a_convolution() -> None:
    def drawn(number: int) -> Tensor:
        torch.manual_seed(number)
        return ExpertGraphConv(DIM, E).conv.own.weight

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


BAD: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: ExpertGraphConv(0, E), "dim=0: must be greater than 0"),
    (lambda: ExpertGraphConv(DIM, 0, max_neighbors=2), "num_experts=0: must be greater than 0"),
    (lambda: ExpertGraphConv(DIM, E, "relu"), "adjacency=relu: must be one of sigmoid, softmax, none; choose one"),
    (lambda: ExpertGraphConv(DIM, E, similarity="l2"), "similarity=l2: must be one of gate, cosine, dot"),
    (lambda: ExpertGraphConv(DIM, E, normalize="all"), "normalize=all: must be one of none, count, degree"),
    (lambda: ExpertGraphConv(DIM, E, max_neighbors=-1), "max_neighbors=-1: must not be negative"),
    (lambda: ExpertGraphConv(DIM, E, max_neighbors=4), "max_neighbors=4: an expert has 3 others to listen to; lower"),
    (lambda: ExpertGraphConv(DIM, E, max_neighbors=5, self_edges=True), "max_neighbors=5: an expert has 4 to listen"),
    (
        lambda: ExpertGraphConv(DIM, E, "none", max_neighbors=2),
        "max_neighbors=2: without learned logits no edge is stronger than another; choose adjacency=sigmoid",
    ),
    (lambda: GraphCoupledMoE(DIM, expert_dim=0), "expert_dim=0: must be greater than 0"),
    (lambda: GraphCoupledMoE(DIM, expert="mlp"), "expert=mlp: must be one of ffn, block"),
    (lambda: GraphCoupledMoE(DIM, gnn_layers=-1), "gnn_layers=-1: must not be negative"),
    (lambda: GraphCoupledMoE(DIM, pooling="max"), "pooling=max: must be one of mean, attention, weighted"),
    (lambda: GraphCoupledMoE(DIM, combiner="mlp"), "combiner=mlp: must be one of none, linear, gelu_norm"),
    (lambda: GraphCoupledMoE(DIM, activation="tanh"), "activation=tanh: must be one of swiglu, geglu, gelu, relu"),
    (lambda: GraphCoupledMoE(DIM, num_heads=2), "num_heads=2: only blocks have attention"),
    (lambda: GraphCoupledMoE(DIM, expert="block", num_heads=3), "num_heads=3: must divide dim=8"),
    (lambda: GraphCoupledMoE(200, expert="block"), "num_heads=3: must divide dim=200"),
    (lambda: GraphCoupledMoE(DIM, expert="block", num_heads=0), "num_heads=0: must be greater than 0"),
    (lambda: GraphCoupledMoE(DIM, orthogonality_loss_coef=-1.0), "orthogonality_loss_coef=-1.0: must not be negative"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message.partition(":")[0] for _, message in BAD])
def test_bad_arguments_are_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert len(error.value.problems) == 1
    assert message in str(error.value)


def test_all_bad_arguments_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        GraphCoupledMoE(DIM, 4, 0, "block", 3, -1, adjacency="x", pooling="y", max_neighbors=9, activation="z")
    keys = {problem.key for problem in error.value.problems}
    assert keys == {
        "expert_dim", "num_heads", "gnn_layers", "adjacency", "pooling", "max_neighbors", "activation"
    }  # fmt: skip
