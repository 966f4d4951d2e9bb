"""Chunks and recomputation bound the memory of a layer of dense experts; they change nothing else."""

from dataclasses import dataclass

import pytest
import torch
from model_samples import config_of, random
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.models.attention import rotary_width
from moe_train.models.blocks import CoupledBlocks
from moe_train.models.build import build_block
from moe_train.models.initialise import initialise
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.graph.layer import GraphLayer
from moe_train.ops.rotary import rotary_table

BATCH, LENGTH = 3, 5
G = "model.ffn.graph"
PRESETS = {"ffn": "model=graph_tiny", "block": "model=graph_block_tiny"}
CHUNKS = (1, 4, 5, 7, 10, 14, 15, 100)
"""Less than a sequence, a sequence, uneven, all but one token, all, more than all."""
EACH_PRESET = pytest.mark.parametrize("kind", PRESETS)


def config_with(kind: str, chunk_tokens: int | None, recompute: bool, *more: str) -> ModelConfig:
    chunk = "null" if chunk_tokens is None else chunk_tokens
    words = (f"{G}.chunk_tokens={chunk}", f"{G}.recompute={str(recompute).lower()}", f"{G}.orthogonality=0.3")
    return config_of(PRESETS[kind], *words, *more)


def layer_of(config: ModelConfig) -> GraphLayer:
    """The layer of the first block, fp64; the same values for every way to compute it."""
    block = build_block(config, 0, LocalExchange(config.ffn.num_experts)).double()
    initialise(block, seed=3)
    layer: GraphLayer = block.layer if isinstance(block, CoupledBlocks) else block.ffn
    return layer


@dataclass(frozen=True)
class Ran:
    """What a forward and backward pass gave."""

    y_BSD: Tensor
    sums: list[Tensor]
    gradients: list[Tensor]


def run(layer: GraphLayer, config: ModelConfig, x_BSD: Tensor, calls: list[int] | None = None) -> Ran:
    """With padding, and the loss of the layer beside that of what it returns."""
    valid_BS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 7 != 6
    context = RoutingContext.of(torch.zeros(BATCH, LENGTH, dtype=torch.int64), valid_BS)
    rotary = rotary_table(LENGTH, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))
    if calls is not None:
        layer.experts.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[:2].numel()))
    output = layer(x_BSD, context, rotary)
    before = [tensor.detach().clone() for tensor in output.record.tensors()]
    gradients: list[Tensor] = []
    if output.y_BSD.requires_grad:
        loss = output.y_BSD.square().sum() + layer.balance.share(output.record, output.record.detached().statistics)
        gradients = list(torch.autograd.grad(loss, [x_BSD, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(output.record.tensors(), before, strict=True)), "backward counted"
    return Ran(output.y_BSD.detach(), before, gradients)


def assert_same(found: Ran, expected: Ran) -> None:
    a = [found.y_BSD, *found.sums, *found.gradients]
    b = [expected.y_BSD, *expected.sums, *expected.gradients]
    for place, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype == y.dtype
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12), place


@EACH_PRESET
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, *CHUNKS])
def test_the_same_values_gradients_and_sums(kind: str, recompute: bool, chunk_tokens: int | None) -> None:
    """Each token counts once, however often it is computed."""
    plain, config = config_with(kind, None, False), config_with(kind, chunk_tokens, recompute)
    x_BSD = random(BATCH, LENGTH, config.dim).requires_grad_()
    expected, found = (run(layer_of(c), c, x_BSD) for c in (plain, config))
    assert len(expected.gradients) == 1 + len(list(layer_of(plain).parameters()))
    assert expected.sums[0].item() == BATCH * LENGTH - 2
    assert_same(found, expected)


@EACH_PRESET
@pytest.mark.parametrize("more", [("orthogonality=0.0",), ("layers=0",), ("max_neighbors=0",), ("pooling=attention",)])
def test_the_same_with_other_graphs(kind: str, more: tuple[str, ...]) -> None:
    """Also where nothing is told, and where the sums have no gradient."""
    words = [f"{G}.{word}" for word in more]
    plain, config = config_with(kind, None, False, *words), config_with(kind, 6, True, *words)
    x_BSD = random(BATCH, LENGTH, config.dim).requires_grad_()
    assert_same(*(run(layer_of(c), c, x_BSD) for c in (config, plain)))


@EACH_PRESET
@pytest.mark.parametrize("in_training", [False, True])
def test_evaluation_is_the_same_and_computes_once(kind: str, in_training: bool) -> None:
    """Without gradients nothing is computed twice, whatever mode the module is in."""
    plain, config = config_with(kind, None, False), config_with(kind, 6, True)
    x_BSD, calls = random(BATCH, LENGTH, config.dim), []
    with torch.no_grad():
        expected = run(layer_of(plain).train(in_training), plain, x_BSD)
        assert_same(run(layer_of(config).train(in_training), config, x_BSD, calls), expected)
    assert sum(calls) == BATCH * LENGTH
    # Evaluation mode with gradients, as a probe of a trained model has them.
    x_BSD.requires_grad_()
    expected = run(layer_of(plain).eval(), plain, x_BSD)
    assert_same(run(layer_of(config).eval(), config, x_BSD), expected)


@pytest.mark.parametrize(
    ("kind", "chunk_tokens", "expected"),
    [
        ("ffn", None, [15]),
        ("ffn", 6, [6, 6, 3]),
        ("ffn", 4, [4, 4, 4, 3]),
        ("ffn", 100, [15]),
        ("block", None, [15]),
        ("block", 1, [5, 5, 5]),
        ("block", 9, [5, 5, 5]),
        ("block", 10, [10, 5]),
        ("block", 100, [15]),
    ],
)
def test_so_many_tokens_at_a_time(kind: str, chunk_tokens: int | None, expected: list[int]) -> None:
    """A sequence stays whole where experts look at sequences; with recomputation each chunk runs twice."""
    for recompute in (False, True):
        calls: list[int] = []
        config = config_with(kind, chunk_tokens, recompute)
        run(layer_of(config), config, random(BATCH, LENGTH, config.dim).requires_grad_(), calls)
        assert calls == (expected + expected[::-1] if recompute else expected)


def kept_bytes(kind: str, num_experts: int, chunk_tokens: int | None, recompute: bool) -> int:
    """Bytes that the forward pass of a layer keeps for its backward pass, without parameters and its input."""
    config = config_with(kind, chunk_tokens, recompute, f"model.ffn.num_experts={num_experts}")
    layer, x_BSD = layer_of(config), random(BATCH, LENGTH, config.dim).requires_grad_()
    known = {tensor.untyped_storage().data_ptr() for tensor in (x_BSD, *layer.parameters())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x  # holds it, so that no other tensor gets its address
        return x

    rotary = rotary_table(LENGTH, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = layer(x_BSD, None, rotary)
    assert output.y_BSD.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@EACH_PRESET
def test_what_is_kept_for_the_backward_pass(kind: str) -> None:
    """Plain: activations of all experts; chunks alone: the same; recomputed: nothing that grows with the experts."""
    plain = {num_experts: kept_bytes(kind, num_experts, None, False) for num_experts in (2, 8)}
    assert plain[8] > 3.5 * plain[2]
    chunks = kept_bytes(kind, 8, 5, False)
    assert 0.95 * plain[8] < chunks < 1.3 * plain[8]
    recomputed = {num_experts: kept_bytes(kind, num_experts, 5, True) for num_experts in (2, 8)}
    assert recomputed[2] == recomputed[8]
    # Of each chunk the inputs of its losses: y and the record, whose sums are fp64.
    assert recomputed[8] < plain[8] / 50


class Alive(nn.Module):
    """Experts that note how many of their results are needed at the same time."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.now = self.most = 0

    def forward(self, x_RSD: Tensor, rotary: object) -> Tensor:
        y_RSLD: Tensor = self.experts(x_RSD, rotary)
        self.now += y_RSLD.shape[:2].numel()
        self.most = max(self.most, self.now)
        if y_RSLD.requires_grad:
            y_RSLD.register_hook(lambda gradient: setattr(self, "now", self.now - gradient.shape[:2].numel()))
        return y_RSLD


@EACH_PRESET
def test_one_chunk_at_a_time_is_alive_in_the_backward_pass(kind: str) -> None:
    """The next chunk is computed again only after the gradients of the last have gone through."""
    for recompute, most in ((False, BATCH * LENGTH), (True, LENGTH)):
        config = config_with(kind, LENGTH, recompute)
        layer = layer_of(config)
        layer.experts = alive = Alive(layer.experts)
        x_BSD = random(BATCH, LENGTH, config.dim).requires_grad_()
        rotary = rotary_table(LENGTH, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))
        output = layer(x_BSD, None, rotary)
        alive.now = alive.most = 0 if recompute else alive.now
        output.y_BSD.square().sum().backward()
        assert alive.most == most
        assert alive.now == 0
