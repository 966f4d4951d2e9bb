"""Transformers of dense experts: no token sees a later one, sequences and padding stay apart, nothing is unused."""

import pytest
import torch
from model_samples import BATCH, LENGTH, VOCAB, build, config_of, random_tokens
from torch import Tensor

from moe_train.models.blocks import Block, CoupledBlocks
from moe_train.models.transformer import PRECISIONS, build_model
from moe_train.moe.context import RoutingContext
from moe_train.moe.exchange import LocalExchange
from moe_train.moe.graph.layer import GraphLayer
from moe_train.moe.roles import Kind, roles_of

FFN, BLOCK = "model=graph_tiny", "model=graph_block_tiny"
G = "model.ffn.graph"
LEARNED = ("model.norm=layer", "model.positions=learned", f"model.max_positions={LENGTH}")
VARIANTS = {
    "ffn": (FFN,),
    "block": (BLOCK,),
    "ffn, chunks of 3 tokens": (FFN, f"{G}.chunk_tokens=3"),
    "block, chunks less than a sequence": (BLOCK, f"{G}.chunk_tokens=3"),
    "ffn, recomputed in chunks": (FFN, f"{G}.chunk_tokens=5", f"{G}.recompute=true"),
    "block, recomputed": (BLOCK, f"{G}.chunk_tokens=8", f"{G}.recompute=true"),
    "original": (
        BLOCK, *LEARNED, "model.tie_embeddings=false", "model.head_bias=true", "model.attention.qkv_bias=true",
        "model.attention.out_bias=true", "model.ffn.expert_bias=true", f"{G}.combiner=gelu_norm",
    ),
    "attention pooling, softmax, cosine, few neighbors": (
        FFN, f"{G}.pooling=attention", f"{G}.adjacency=softmax", f"{G}.similarity=cosine", f"{G}.max_neighbors=2",
    ),
    "weighted pooling, self-edges, dot, degree": (
        BLOCK, f"{G}.pooling=weighted", f"{G}.self_edges=true", f"{G}.similarity=dot", f"{G}.normalize=degree",
        f"{G}.combiner=linear",
    ),
    "every other layer": (FFN, "model.ffn.every=2"),
    "two tokens further ahead": (BLOCK, "model.mtp.depth=2"),
}  # fmt: skip
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def logits_of(variant: str, tokens_BS: Tensor) -> Tensor:
    return build(config_of(*VARIANTS[variant]))(tokens_BS).logits_BSV


@EACH_VARIANT
def test_no_token_sees_a_later_one(variant: str) -> None:
    model, tokens_BS = build(config_of(*VARIANTS[variant])), random_tokens()
    logits_BSV = model(tokens_BS).logits_BSV
    for t in range(1, LENGTH):
        changed_BS = tokens_BS.clone()
        changed_BS[:, t:] = (tokens_BS[:, t:] + 1 + torch.arange(LENGTH - t)) % VOCAB
        changed_BSV = model(changed_BS).logits_BSV
        assert torch.allclose(changed_BSV[:, :t], logits_BSV[:, :t], rtol=0, atol=1e-14), f"position {t}"
        assert (changed_BSV[:, t:] - logits_BSV[:, t:]).abs().amax(dim=2).min() > 1e-6
        # Whoever changes one token alone changes later ones, too: attention still reaches back.
        changed_BS = tokens_BS.clone()
        changed_BS[:, t - 1] = (tokens_BS[:, t - 1] + 1) % VOCAB
        assert (model(changed_BS).logits_BSV[:, t:] - logits_BSV[:, t:]).abs().amax(dim=2).min() > 1e-9


@pytest.mark.parametrize("variant", ["ffn", "block", "block, recomputed"])
def test_nor_does_a_gradient_come_from_an_earlier_one(variant: str) -> None:
    """The same backwards: an early score depends on no later embedding."""
    model, tokens_BS = build(config_of(*VARIANTS[variant], "model.tie_embeddings=false")), random_tokens(batch=1)
    tokens_BS = torch.arange(LENGTH).unsqueeze(0)  # every position a token of its own
    model(tokens_BS).logits_BSV[:, 3].square().sum().backward()
    moved_V = model.embedding_VD.grad.abs().amax(dim=1) > 0
    assert moved_V.tolist() == [True] * 4 + [False] * (VOCAB - 4)


@EACH_VARIANT
def test_sequences_do_not_see_each_other(variant: str) -> None:
    model, tokens_BS = build(config_of(*VARIANTS[variant])), random_tokens()
    together_BSV = model(tokens_BS).logits_BSV
    alone_BSV = torch.cat([model(tokens_S.unsqueeze(0)).logits_BSV for tokens_S in tokens_BS])
    assert torch.allclose(together_BSV, alone_BSV, rtol=0, atol=1e-12)


@EACH_VARIANT
def test_padding_at_the_end_changes_nothing_before_it_and_counts_nowhere(variant: str) -> None:
    model, tokens_BS = build(config_of(*VARIANTS[variant])), random_tokens()
    valid_BS = (torch.arange(LENGTH) < 5).expand(BATCH, LENGTH)
    other_BS = torch.where(valid_BS, tokens_BS, 0)
    found, expected = (model(t_BS, RoutingContext.of(t_BS, valid_BS)) for t_BS in (other_BS, tokens_BS))
    assert torch.allclose(found.logits_BSV[:, :5], expected.logits_BSV[:, :5], rtol=0, atol=1e-12)
    short = model(tokens_BS[:, :5])
    for depth, *records in zip(model.moe_layers, found.records, expected.records, short.records, strict=True):
        steps_ahead = max(0, depth + 1 - model.config.layers)  # of multi-token prediction: these see so many fewer
        assert [record.tokens.item() for record in records[:2]] == [BATCH * (5 - steps_ahead)] * 2
        if steps_ahead == 0:
            for a, b, c in zip(*(record.tensors() for record in records), strict=True):
                assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
                assert torch.allclose(a, c, rtol=1e-12, atol=1e-12)


@EACH_VARIANT
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_parameter_is_used_in_every_precision(variant: str, precision: str) -> None:
    model = build(config_of(*VARIANTS[variant]), precision)
    output = model(random_tokens())
    scores = [output.logits_BSV, *output.mtp_logits]
    assert {logits_BSV.dtype for logits_BSV in scores} == {PRECISIONS[precision].activations}
    sum(logits_BSV.float().square().mean() for logits_BSV in scores).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == PRECISIONS[precision].weights, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} is not used"


@EACH_VARIANT
def test_roles_and_places(variant: str) -> None:
    """What experts hold is an expert's, the coupling is everyone's; nothing routes."""
    config = config_of(*VARIANTS[variant])
    model = build(config)
    kinds = {name: role.kind for name, role in roles_of(model).items()}
    assert kinds == {name: Kind.EXPERT if ".experts." in name else Kind.DENSE for name in kinds}
    assert all(isinstance(layer, GraphLayer) for layer in model.moe_layers.values())
    block = model.blocks[-1]
    assert isinstance(block, CoupledBlocks if config.ffn.graph.expert == "block" else Block)
    assert len(model.moe_layers) == len(build(config)(random_tokens()).records)


@EACH_VARIANT
def test_the_meta_device_builds_the_same_model(variant: str) -> None:
    config = config_of(*VARIANTS[variant])
    exchange = LocalExchange(config.ffn.num_experts)
    thought = build_model(config, VOCAB, exchange, "fp64", torch.device("meta"))
    assert all(tensor.is_meta for tensor in thought.state_dict().values())
    found, expected = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        for model in (thought, build(config))
    )
    assert found == expected


@pytest.mark.parametrize("preset", [FFN, BLOCK])
def test_experts_in_another_order_make_the_same_model(preset: str) -> None:
    """Their weights, and rows and columns of each graph, in the same order."""
    model, tokens_BS = build(config_of(preset, f"{G}.max_neighbors=2")), random_tokens()
    before, order = model(tokens_BS), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(parameter[order])
            elif name.endswith("logits_EE"):
                parameter.copy_(parameter[order][:, order])
    after = model(tokens_BS)
    assert torch.allclose(after.logits_BSV, before.logits_BSV, rtol=0, atol=1e-11)
    for a, b in zip(after.records, before.records, strict=True):
        assert torch.allclose(a.cosines_EE, b.cosines_EE[order][:, order], rtol=1e-11, atol=1e-11)
        assert torch.allclose(a.strengths_MEE, b.strengths_MEE[:, order][:, :, order], rtol=1e-11, atol=1e-11)
