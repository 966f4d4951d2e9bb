"""Experts that are whole blocks: one module of stacked weights is so many separate blocks."""

import pytest
import torch
from model_samples import LATENT, config_of, filled, random
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.models.attention import build_attention, rotary_width
from moe_train.models.block_experts import BlockExperts
from moe_train.models.blocks import Block, CoupledBlocks
from moe_train.models.build import build_block
from moe_train.models.initialise import initialise
from moe_train.models.modules import FeedForward
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.roles import Kind, roles_of
from moe_train.ops.rotary import Rotary, rotary_table

HELD = range(4, 7)
GRAPH = ("model=graph_block_tiny",)
BIASES = ("model.attention.qkv_bias=true", "model.attention.out_bias=true", "model.ffn.expert_bias=true")
KINDS = {
    "grouped queries": (),
    "biases, LayerNorm, learned positions": (
        *BIASES, "model.norm=layer", "model.positions=learned", "model.max_positions=16",
        "model.ffn.expert_activation=gelu",
    ),
    "norms of queries and keys": ("model.attention.qk_norm=head", "model.attention.head_dim=6"),
    "window and sinks": ("model.attention.window=3", "model.attention.sinks=true"),
    "latent attention": ("model.attention.kind=mla", *LATENT, "model.attention.q_rank=5"),
}  # fmt: skip
EACH_KIND = pytest.mark.parametrize("config", [config_of(*GRAPH, *words) for words in KINDS.values()], ids=KINDS)


def block_of(config: ModelConfig) -> Block:
    ffn = config.ffn
    activation = ffn.expert_activation or ffn.activation
    network = FeedForward(config.dim, ffn.expert_dim, activation, 1.0, 1.0, ffn.expert_bias)
    return Block(config, build_attention(config, 0, 1.0), network)


def experts_of(config: ModelConfig, experts: range = HELD) -> BlockExperts:
    return filled(BlockExperts(block_of(config).double(), experts))


def rotary_of(config: ModelConfig, length: int) -> Rotary | None:
    if config.positions == "learned":
        return None
    return rotary_table(length, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))


def separate(experts: BlockExperts, config: ModelConfig) -> list[Block]:
    """Blocks of their own with the same weights."""
    blocks = []
    for place in range(experts.num_held):
        block = block_of(config).double()
        block.load_state_dict({name: stacked[place] for name, stacked in experts.block.state_dict().items()})
        blocks.append(block)
    return blocks


@EACH_KIND
def test_stacked_blocks_are_separate_blocks(config: ModelConfig) -> None:
    """Values, and the gradients of the input and of every weight."""
    experts, x_RSD = experts_of(config), random(2, 5, config.dim).requires_grad_()
    blocks, rotary = separate(experts, config), rotary_of(config, 5)
    y_RSLD = experts(x_RSD, rotary)
    context = RoutingContext.of(torch.zeros(2, 5, dtype=torch.int64))
    each = [block(x_RSD, rotary, context).x_BSD for block in blocks]
    assert torch.allclose(y_RSLD, torch.stack(each, dim=2), rtol=1e-12, atol=1e-12)
    assert (each[0] - each[1]).abs().max() > 1e-3
    upstream = random(*y_RSLD.shape, seed=3)
    names, parameters = zip(*experts.block.named_parameters(), strict=True)
    own = [dict(block.named_parameters()) for block in blocks]
    assert list(names) == list(own[0])
    found = torch.autograd.grad(y_RSLD, [x_RSD, *parameters], upstream)
    pieces = [block[name] for name in names for block in own]
    x_gradient, *rest = torch.autograd.grad(torch.stack(each, dim=2), [x_RSD, *pieces], upstream)
    stacked = [torch.stack(rest[at : at + len(blocks)]) for at in range(0, len(rest), len(blocks))]
    for name, a, b in zip(["input", *names], found, [x_gradient, *stacked], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.abs().max().item())), name


@EACH_KIND
def test_every_weight_is_one_per_expert(config: ModelConfig) -> None:
    """Its name is that in a block, its role that of an expert's, its values those of a block of its own."""
    experts, block = experts_of(config), block_of(config)
    roles, own = roles_of(experts), roles_of(block)
    assert list(experts.state_dict()) == [f"block.{name}" for name in block.state_dict()]
    for name, parameter in block.named_parameters():
        assert experts.get_parameter(f"block.{name}").shape == (len(HELD), *parameter.shape), name
        role = roles[f"block.{name}"]
        assert (role.kind, role.experts) == (Kind.EXPERT, HELD), name
        assert (role.std, role.mean, role.decays) == (own[name].std, own[name].mean, own[name].decays), name


@EACH_KIND
def test_initial_values_are_those_of_the_expert_whoever_holds_it(config: ModelConfig) -> None:
    whole, shards = experts_of(config, range(4)), [experts_of(config, range(2)), experts_of(config, range(2, 4))]
    for module in (whole, *shards):
        initialise(module, seed=5)
    for name, parameter in whole.named_parameters():
        pieces = [dict(shard.named_parameters())[name] for shard in shards]
        assert torch.equal(parameter, torch.cat(pieces)), name
        role = roles_of(whole)[name]
        if role.std is None:
            assert parameter.eq(1.0).all(), name
        elif role.std == 0.0:
            assert not parameter.any(), name
        else:
            assert all((parameter[0] - parameter[place]).abs().max() > 1e-3 for place in range(1, 4)), name


def test_names_in_a_model() -> None:
    """Under the layer of the block that the experts take the place of."""
    config = config_of(*GRAPH)
    block = build_block(config, 0, LocalExchange(4))
    assert isinstance(block, CoupledBlocks)
    names = set(block.state_dict())
    assert {name for name in names if ".experts." in name} == {
        "layer.experts.block.attention_norm.weight", "layer.experts.block.attention.qkv.weight",
        "layer.experts.block.attention.out.weight", "layer.experts.block.ffn_norm.weight",
        "layer.experts.block.ffn.gate_up.weight", "layer.experts.block.ffn.down.weight",
    }  # fmt: skip
    assert all(name.startswith("layer.coupling.") for name in names if ".experts." not in name)


@EACH_KIND
def test_meta_weights_stay_on_meta(config: ModelConfig) -> None:
    with torch.device("meta"):
        experts = BlockExperts(block_of(config), HELD)
    assert all(parameter.is_meta for parameter in experts.parameters())


def test_the_backward_pass_of_a_stack_is_one_tensor_per_parameter() -> None:
    """Not L full ones, added up: what it saves and makes does not grow with the square of the number of experts."""
    config, sizes = config_of(*GRAPH), {}
    for held in (2, 8):
        experts, made = experts_of(config, range(held)), []
        weight = experts.block.ffn.gate_up.weight
        weight.register_hook(lambda gradient, made=made: made.append(gradient.numel()))
        experts(random(1, 2, config.dim), rotary_of(config, 2)).sum().backward()
        nodes, seen, edges = 0, set(), [experts(random(1, 2, config.dim), rotary_of(config, 2)).grad_fn]
        while edges:
            node = edges.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += "Select" in node.name()
            edges += [edge for edge, _ in node.next_functions]
        sizes[held] = nodes
        assert made == [weight.numel()]
    assert sizes == {2: 0, 8: 0}


def outputs(experts: BlockExperts, x_RSD: Tensor, config: ModelConfig) -> Tensor:
    return experts(x_RSD, rotary_of(config, x_RSD.shape[1]))


@EACH_KIND
def test_sequences_and_experts_do_not_see_each_other(config: ModelConfig) -> None:
    experts, x_RSD = experts_of(config), random(3, 4, config.dim)
    together = outputs(experts, x_RSD, config)
    alone = torch.cat([outputs(experts, x_1SD, config) for x_1SD in x_RSD.split(1)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[1] += 0.5
    moved_L = (outputs(experts, x_RSD, config) - together).abs().amax(dim=(0, 1, 3)) > 1e-6
    assert moved_L.tolist() == [False, True, False]
