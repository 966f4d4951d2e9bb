"""Activation checkpointing runs a layer twice: it must decide, count and learn as if it had run once."""

import operator
from functools import reduce

import pytest
import torch
from moe_samples import DIM, make_layer, tokens
from routing_cases import LEARNED, context_of, ffn_of, random, with_router
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.config.model import FFNConfig
from moe_train.moe.balance import RoutingRecord
from moe_train.moe.layer import MoELayer
from moe_train.moe.record import LayerOutput

BATCH, LENGTH = 3, 8
LOSSES = {"aux": {"coef": 0.3}, "z_loss": {"coef": 0.1}, "importance_load": {"load_coef": 0.0}}
LIMITS = {"kind": "factor", "factor": 0.75, "policy": "random"}


def complete(ffn: FFNConfig) -> FFNConfig:
    """The same with balance losses, drops and everything drawn that can be."""
    ffn = with_router(ffn, jitter=0.1, expert_dropout=0.2)
    capacity = {"kind": "dropless"} if ffn.router.kind == "expert_choice" else LIMITS
    return FFNConfig.model_validate(ffn.model_dump() | {"balance": LOSSES, "capacity": capacity})


def run(layer: MoELayer, x_BSD: Tensor, is_checkpointed: bool) -> LayerOutput:
    context = context_of(BATCH, LENGTH, seed=3)
    if is_checkpointed:
        output: LayerOutput = checkpoint(layer, x_BSD, context, use_reentrant=False)
        return output
    return layer(x_BSD, context)


def learn(layer: MoELayer, output: LayerOutput) -> None:
    share = layer.balance.share(output.record, output.record.detached().statistics)
    (output.y_BSD.square().sum() + share).backward()


def assert_same(a: RoutingRecord, b: RoutingRecord) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("ffn", LEARNED.values(), ids=LEARNED)
def test_traps_15_17_28_a_recomputed_layer_has_the_same_record_and_gradients(ffn: FFNConfig) -> None:
    """The same loss and counts, each token counted once, the same experts both times."""
    seen = []
    for is_checkpointed in (False, True):
        layer, x_BSD = make_layer(ffn=complete(ffn)).train(), tokens(BATCH, LENGTH)
        with torch.no_grad():
            for place, parameter in enumerate(layer.router.parameters()):
                parameter.copy_(random(*parameter.shape, seed=place))
        torch.manual_seed(is_checkpointed)
        output = run(layer, x_BSD, is_checkpointed)
        before = [tensor.clone() for tensor in output.record.tensors()]
        learn(layer, output)
        assert all(torch.equal(a, b) for a, b in zip(output.record.tensors(), before, strict=True)), "backward counted"
        seen.append((output, [x_BSD.grad, *(parameter.grad for parameter in layer.parameters())]))
    (plain, plain_gradients), (again, gradients) = seen
    assert torch.equal(again.y_BSD, plain.y_BSD)
    assert_same(again.record, plain.record)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))


def test_trap_17_layers_with_and_without_checkpointing_side_by_side_count_alike() -> None:
    """No rule of halving counts could be right for both."""
    ffn = ffn_of("sigmoid", 4, 2, {"loss_free": {}, "aux": {}})
    records = {}
    for pattern in ((False, False), (True, False), (True, True)):
        layers, x_BSD = [make_layer(ffn=ffn).train(), make_layer(ffn=ffn).train()], tokens(BATCH, LENGTH)
        outputs = []
        for layer, is_checkpointed in zip(layers, pattern, strict=True):
            outputs.append(run(layer, x_BSD, is_checkpointed))
            x_BSD = x_BSD + outputs[-1].y_BSD
        x_BSD.sum().backward()
        records[pattern] = [output.record for output in outputs]
        assert [record.counts_E.sum().item() for record in records[pattern]] == [BATCH * LENGTH * 2] * 2
    for pattern in ((True, False), (True, True)):
        for a, b in zip(records[pattern], records[False, False], strict=True):
            assert_same(a, b)


def test_two_micro_batches_count_as_the_whole_batch() -> None:
    layer = make_layer(ffn=complete(LEARNED["topk"])).train()
    x_BSD = tokens(2, LENGTH)
    parts = [layer(x_BSD[b : b + 1], context_of(1, LENGTH, seed=3, first=b)).record for b in range(2)]
    whole = layer(x_BSD, context_of(2, LENGTH, seed=3)).record
    for a, b in zip(reduce(operator.add, parts).tensors(), whole.tensors(), strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    assert x_BSD.shape[2] == DIM
