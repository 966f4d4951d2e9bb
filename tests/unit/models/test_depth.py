"""Mixture-of-Depths: what passes a block and what does not, in training and where later tokens are not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import VOCAB, build, config_of, random, random_tokens
from torch import Tensor
from torch.nn import functional as F

from moe_train.config.depth import MixtureOfDepthsConfig
from moe_train.config.model import ModelConfig
from moe_train.models.attention import rotary_width
from moe_train.models.blocks import Block
from moe_train.models.depth import DepthBlock, DepthRecord, best_tokens, in_front, num_taken
from moe_train.models.memory import TextMemory
from moe_train.models.transformer import Transformer
from moe_train.moe.context import RoutingContext
from moe_train.moe.foresight import looking_ahead
from moe_train.moe.record import LayerRecord
from moe_train.ops.rotary import Rotary, rotary_table

B, S = 3, 16
DENSE = ("model=dense_tiny", "model.ffn.num_experts=0")
MODELS = {
    "dense": DENSE,
    "staged: experts in the block": (),
    "capacity per sequence": ("model.ffn.capacity.kind=factor", "model.ffn.capacity.factor=0.8"),
    "latent attention": ("model.attention.kind=mla", "model.attention.kv_rank=6", "model.attention.nope_dim=3",
                         "model.attention.rope_dim=4", "model.attention.v_dim=5", "~model.attention.kv_heads"),
    "coupled networks": ("model=graph_tiny",),
    "learned positions": (*DENSE, "model.positions=learned", "model.max_positions=64"),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
both_ways = pytest.mark.parametrize("causal", ["classifier", "predictor"])


def deep(*overrides: str, capacity: float = 0.25, causal: str = "predictor", weight: str = "linear") -> ModelConfig:
    """Two layers, of which some tokens pass the second."""
    config = config_of(*overrides)
    depth = MixtureOfDepthsConfig(capacity=capacity, causal=causal, weight=weight, predictor_dim=7)  # type: ignore[arg-type]
    return config.model_copy(update={"depth": depth})


def model_of(name: str = "dense", **depth: object) -> Transformer:
    """With a predictor that says yes to about every other token: as initialised, its biases are zero."""
    model = build(deep(*MODELS[name], **depth))  # type: ignore[arg-type]
    (block,) = blocks_of(model)
    if block.router.verdict is not None and block.router.hidden is not None:
        inputs: list[Tensor] = []
        with torch.no_grad():
            block.router.hidden.bias.copy_(random(7, seed=4))
            block.router.verdict.weight.copy_(random(1, 7, seed=6))
            hook = block.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
            model(random_tokens(B, S))
            hook.remove()
            block.router.verdict.bias -= scores_of(block, inputs[0])[1].median() + 1e-3  # of none exactly
    return model


def blocks_of(model: Transformer) -> list[DepthBlock]:
    return [block for block in model.all_blocks if isinstance(block, DepthBlock)]


def block_of(name: str = "dense", **depth: object) -> DepthBlock:
    (block,) = blocks_of(model_of(name, **depth))
    return block


def depth_record(records: Sequence[LayerRecord]) -> DepthRecord:
    (found,) = [record for record in records if isinstance(record, DepthRecord)]
    return found


def rotary_of(block: DepthBlock, config: ModelConfig, length: int = S) -> Rotary | None:
    if config.positions == "learned":
        return None
    return rotary_table(length, rotary_width(config), config.attention, torch.float64, torch.device("cpu"))


def context_of(lengths: Sequence[int] | None = None, size: int = B, length: int = S) -> RoutingContext:
    """Sequences of which the first tokens are valid."""
    ids_BS = random_tokens(size, length)
    valid_BS = None if lengths is None else torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    return RoutingContext.of(ids_BS, valid_BS)


def taken_by_hand(block: DepthBlock, x_BSD: Tensor, context: RoutingContext) -> list[list[int]]:
    """The best of each sequence, number by number."""
    count, valid_BS = math.ceil(0.25 * x_BSD.shape[1]), context.valid_T.view(x_BSD.shape[:2])
    found = []
    for x_SD, valid_S in zip(x_BSD, valid_BS.tolist(), strict=True):
        scores = {s: (x_SD[s] @ block.router.weight_D).item() for s in range(len(x_SD)) if valid_S[s]}
        found.append(sorted(sorted(scores, key=lambda s: (-scores[s], s))[:count]))
    return found


@every_model
@pytest.mark.parametrize("lengths", [None, [16, 3, 0]])
def test_the_best_tokens_pass_and_meet_only_each_other_at_their_places(name: str, lengths: list[int] | None) -> None:
    """Each sequence by itself through the plain block, as if it consisted of its chosen tokens alone."""
    block, config = block_of(name), deep(*MODELS[name])
    x_BSD, context = random(B, S, 16), context_of(lengths)
    rotary, output = rotary_of(block, config), block(x_BSD, rotary_of(block, config), context)
    expected_BSD = x_BSD.clone()
    for b, taken in enumerate(taken_by_hand(block, x_BSD, context)):
        if not taken:
            continue
        rows_CD, places = x_BSD[b, taken], torch.tensor([taken])
        own = None if rotary is None else Rotary(rotary.cos_SW[taken], rotary.sin_SW[taken])
        alone = RoutingContext(context.ids_BS[b : b + 1], context.sequences_B[b : b + 1]).chosen(places)
        delta_CD = block.block(rows_CD.unsqueeze(0), own, alone).x_BSD[0] - rows_CD
        expected_BSD[b, taken] += (rows_CD @ block.router.weight_D).unsqueeze(1) * delta_CD
    if name == "capacity per sequence" and lengths is None:
        assert int(output.records[1].dropped_capacity) > 0, "the capacity must bind among the chosen"
    assert torch.allclose(output.x_BSD, expected_BSD, rtol=0, atol=1e-11)


@every_model
@pytest.mark.parametrize("lengths", [None, [16, 3, 0]])
@pytest.mark.parametrize("training", [True, False])
def test_what_passes_by_keeps_every_bit(name: str, lengths: list[int] | None, training: bool) -> None:
    block, config, context = block_of(name).train(training), deep(*MODELS[name]), context_of(lengths)
    x_BSD = random(B, S, 16)
    x_BSD[:, ::3, ::2] = -0.0
    output = block(x_BSD, rotary_of(block, config), context)
    passage = block.choose(*scores_of(block, x_BSD), context)
    same_BS = (output.x_BSD.view(torch.int64) == x_BSD.view(torch.int64)).all(dim=2)
    assert torch.equal(~same_BS, passage.taken_BS)
    assert 0 < int(passage.taken_BS.sum()) < int(context.valid_T.sum())


def scores_of(block: DepthBlock, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    scores_BS = block.router.scores(x_BSD)
    return scores_BS, block.router.causal_logits(x_BSD, scores_BS)


@every_model
def test_with_all_tokens_and_weight_one_it_is_the_plain_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, config = block_of(name, capacity=1.0), deep(*MODELS[name])
    monkeypatch.setattr(block.router, "gates", torch.ones_like)
    x_BSD, context, rotary = random(B, S, 16).requires_grad_(), context_of(), rotary_of(block, config)
    found, expected = block(x_BSD, rotary, context), block.block(x_BSD, rotary, context)
    assert torch.allclose(found.x_BSD, expected.x_BSD, rtol=0, atol=1e-12)
    upstream = random(B, S, 16, seed=2)
    parameters = [x_BSD, *block.block.parameters()]
    gradients = [
        torch.autograd.grad(y.x_BSD, parameters, upstream, allow_unused=True, materialize_grads=True)
        for y in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(found.records[1:], expected.records, strict=True):
        assert all(torch.allclose(p.double(), q.double()) for p, q in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("weight", ["linear", "sigmoid"])
def test_what_a_block_adds_is_weighted_by_the_router_which_learns_from_it(weight: str) -> None:
    block, config = block_of(weight=weight), deep(*DENSE)
    x_BSD, context, rotary = random(B, S, 16), context_of(), rotary_of(block_of(), config)
    y_BSD = block(x_BSD, rotary, context).x_BSD
    block.router.weight_D.data *= 2  # the same tokens
    twice_BSD = block(x_BSD, rotary, context).x_BSD
    scores_BS = block.router.scores(x_BSD) / 2
    gates = (scores_BS, 2 * scores_BS) if weight == "linear" else (scores_BS.sigmoid(), (2 * scores_BS).sigmoid())
    assert torch.allclose((twice_BSD - x_BSD) * gates[0].unsqueeze(2), (y_BSD - x_BSD) * gates[1].unsqueeze(2))
    (gradient_D,) = torch.autograd.grad(twice_BSD.square().sum(), [block.router.weight_D])
    assert (gradient_D.abs() > 1e-6).all()


@both_ways
@every_model
@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_the_record_and_its_loss_are_those_of_the_formula(name: str, causal: str, coef: float) -> None:
    block, config, context = block_of(name, causal=causal), deep(*MODELS[name]), context_of([16, 9, 0])
    block.router.balance = replace(block.router.balance, coef=coef)
    x_BSD = random(B, S, 16).requires_grad_()
    record = block(x_BSD, rotary_of(block, config), context).records[0]
    assert isinstance(record, DepthRecord)
    taken = taken_by_hand(block, x_BSD, context)
    loss, agreed, willing = torch.zeros((), dtype=torch.float64), 0, 0
    for b, length in enumerate([16, 9, 0]):
        for s in range(length):
            logit = x_BSD[b, s] @ block.router.weight_D
            if causal == "predictor":
                h_N = (block.router.hidden.weight @ x_BSD[b, s].detach() + block.router.hidden.bias).clamp(min=0)
                logit = (block.router.verdict.weight @ h_N + block.router.verdict.bias).squeeze()
            chance = 1 / (1 + torch.exp(-logit))
            loss = loss - torch.log(chance if s in taken[b] else 1 - chance)
            willing += bool(chance > 0.5)
            agreed += bool(chance > 0.5) == (s in taken[b])
    parameters = [x_BSD, *block.router.parameters()]
    share = block.router.balance.share(record, record.statistics)
    expected = torch.autograd.grad(coef * loss, parameters, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(share, parameters, allow_unused=True, materialize_grads=True)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert (not found[0].any()) == (causal == "predictor" or coef == 0), "only the classifier's gradient is the model's"
    assert torch.allclose(block.router.balance.values(record.statistics)["depth_loss"], loss)
    assert record.figures() == {
        "chosen_share": sum(map(len, taken)) / 25, "causal_share": willing / 25, "causal_accuracy": agreed / 25
    }  # fmt: skip
    assert 0 < willing < 25


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_best_are_those_of_a_sort(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 9))
    scores = data.draw(
        st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 1.0 + 1e-12, 2.0]), min_size=length, max_size=length)
    )
    valid, count = (
        data.draw(st.lists(st.booleans(), min_size=length, max_size=length)),
        data.draw(st.integers(1, length)),
    )
    fp32 = torch.tensor(scores, dtype=torch.float64).float().tolist()
    ranked = sorted((s for s in range(length) if valid[s]), key=lambda s: (-fp32[s], s))[:count]
    best_BS = best_tokens(torch.tensor([scores], dtype=torch.float64), torch.tensor([valid]), count)
    assert best_BS[0].nonzero().flatten().tolist() == sorted(ranked)
    others = [s for s in range(length) if s not in ranked]
    assert in_front(best_BS, length)[0].tolist() == [*sorted(ranked), *others]


@pytest.mark.parametrize(
    ("capacity", "length", "count"),
    [(0.125, 8, 1), (0.125, 9, 2), (0.125, 1, 1), (0.07, 100, 7), (0.1, 30, 3), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_the_capacity_is_rounded_up_as_the_decimal_number_that_it_is(capacity: float, length: int, count: int) -> None:
    assert num_taken(MixtureOfDepthsConfig(capacity=capacity), length) == count


@both_ways
@every_model
def test_in_evaluation_no_token_knows_later_ones(name: str, causal: str) -> None:
    """Sequences continue differently after t; up to t all is the same, but for where rows are filled up to."""
    if name == "capacity per sequence":
        pytest.skip("a capacity that holds in evaluation is not asked for: model.ffn.capacity.eval_factor is unset")
    model = model_of(name, causal=causal).eval()
    first, second = random_tokens(B, S), random_tokens(B, S, seed=1)
    whole = model(first)
    assert 0 < int(depth_record(whole.records).taken) < B * S
    for t in range(S):
        mixed = torch.cat([first[:, : t + 1], second[:, t + 1 :]], dim=1)
        assert torch.allclose(model(mixed).logits_BSV[:, : t + 1], whole.logits_BSV[:, : t + 1], atol=1e-12, rtol=0)
    with looking_ahead(model):
        ahead = model(first)
        assert int(depth_record(ahead.records).taken) == B * 4
        leaks = [model(torch.cat([first[:, :t], second[:, t:]], dim=1)).logits_BSV[:, :t] for t in range(1, S)]
    most = max(float((early - ahead.logits_BSV[:, : early.shape[1]]).abs().max()) for early in leaks)
    assert most > 1e-6, "the choice that looks ahead does know them: the test can fail"
    assert torch.equal(model.train()(first).logits_BSV, ahead.logits_BSV)


@both_ways
@pytest.mark.parametrize("name", ["dense", "staged: experts in the block", "latent attention", "learned positions"])
def test_a_text_that_is_continued_is_the_text_read_at_once(name: str, causal: str) -> None:
    """In pieces of any size; a block remembers those tokens only that it took."""
    model = model_of(name, causal=causal).eval()
    tokens_BS = random_tokens(1, 24)
    whole = model(tokens_BS)
    taken = int(depth_record(whole.records).taken)
    assert 2 < taken < 22
    for pieces in ([24], [1] * 24, [5, 1, 1, 9, 1, 7]):
        memory = TextMemory(2)
        parts = [model(piece, memory=memory).logits_BSV for piece in torch.split(tokens_BS, pieces, dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), whole.logits_BSV, rtol=0, atol=1e-12)
        assert [block.length for block in memory.blocks] == [24, taken]
    with looking_ahead(model):  # there is nothing to look at: later tokens do not exist yet
        memory = TextMemory(2)
        parts = [model(piece, memory=memory).logits_BSV for piece in tokens_BS.split(1, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole.logits_BSV, rtol=0, atol=1e-12)


def test_no_token_may_be_taken_and_the_block_still_runs() -> None:
    """Other ranks may wait for what it exchanges."""
    model = model_of("staged: experts in the block", causal="classifier").eval()
    (block,) = blocks_of(model)
    block.router.weight_D.data.zero_()  # a score of zero is no yes
    seen: list[int] = []
    block.block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    memory = TextMemory(2)
    x_BSD = random(1, S, 16)
    output = block(x_BSD, None, context_of(size=1), memory.blocks[1])
    assert torch.equal(output.x_BSD, x_BSD) and seen == [1]
    assert memory.blocks[1].length == 0
    assert int(output.records[1].tokens) == 0


def test_the_blocks_of_modules_that_look_ahead_take_all_tokens() -> None:
    config = deep("model.mtp.depth=2")
    assert [isinstance(block, DepthBlock) for block in build(config).all_blocks] == [False, True, False, False]
    names = [key.name for key in build(config).expert_layers]
    assert names == ["layer_00", "layer_01_depth", "layer_01", "layer_02", "layer_03"]


def test_every_nth_block_is_passed_by_and_around_it_stands_the_same_block() -> None:
    config = config_of(*DENSE, "model.layers=7")
    depths = {every: config.model_copy(update={"depth": MixtureOfDepthsConfig(every=every)}) for every in (1, 2, 3)}
    found = {every: [isinstance(b, DepthBlock) for b in build(one).all_blocks] for every, one in depths.items()}
    assert found == {1: [True] * 7, 2: [False, True] * 3 + [False], 3: [False, False, True] * 2 + [False]}
    assert all(isinstance(block.inner, Block) for block in build(depths[2]).all_blocks)


def test_scores_and_gates_are_precise_in_bf16() -> None:
    model = build(deep(*DENSE), "bf16")
    (block,) = blocks_of(model)
    x_BSD = random(B, S, 16).to(torch.bfloat16)
    scores_BS = block.router.scores(x_BSD)
    assert scores_BS.dtype == torch.float32
    assert torch.allclose(scores_BS.double(), x_BSD.double() @ block.router.weight_D.double(), atol=1e-6)
    output = model.train()(random_tokens(B, S))
    assert output.logits_BSV.dtype == torch.bfloat16
    F.cross_entropy(output.logits_BSV.flatten(0, 1).float(), random_tokens(B, S).flatten() % VOCAB).backward()
    assert block.router.weight_D.grad is not None and block.router.weight_D.grad.isfinite().all()
