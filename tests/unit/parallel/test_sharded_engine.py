"""The engine over shards: what a rank holds, first values, the norm, refusals, zeros, evaluation, bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from layouts import VOCAB, Case, gathered, rank_batches, torch_engine
from mesh_checks import said_of
from spawn import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train.dist.mesh import Mesh, build_mesh
from moe_train.dist.world import World
from moe_train.models.initialise import initialise
from moe_train.models.transformer import Transformer
from moe_train.moe.capacity import is_padded
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.build import build_engine, gather_dtype
from moe_train.parallel.engine import NonFiniteGradientError, TorchEngine
from moe_train.parallel.shard import ShardedGradients
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

CASE = Case("top-2, shared expert, a module ahead",
            ("model.mtp.depth=1", "model.ffn.num_shared_experts=1", "balance.loss_free.rate=0.05"))  # fmt: skip
GRAPHS = [Case(f"graph of {kind}", (f"model={preset}", "model.layers=1"))
          for kind, preset in (("networks", "graph_tiny"), ("blocks", "graph_block_tiny"))]  # fmt: skip
RATE = 1e-2


def exchange_on(mesh: Mesh, case: Case):
    ffn = case.config().model.ffn
    return exchange_for(mesh, ffn.num_experts, is_padded(ffn.capacity))


def built(world: World, mesh: Mesh, case: Case, starter: Callable[[Transformer], None] | None = None) -> TorchEngine:
    config = case.config()
    make_optimizer = partial(build_optimizer, config=config.optim)
    return build_engine(config, mesh, world, exchange_on(mesh, case), VOCAB, make_optimizer, starter)


def weights_of(engine: TorchEngine, mesh: Mesh) -> dict[str, Tensor]:
    return gathered(engine.model, mesh, lambda p: p)


def train(engine: TorchEngine, mesh: Mesh, case: Case, accumulation: int = 1, number: int = 0) -> float:
    batch = case.batches()[number]
    batches = rank_batches(batch, mesh.rank, mesh.layout.world_size, accumulation)
    settings = StepSettings(RATE, 0.5, seed=0, mtp_coef=0.3)
    return train_step(engine, mesh, batches, batch[0].numel(), settings).grad_norm.item()


def check_first_values(world: World, mesh: Mesh) -> None:
    """Drawn in shards, or whole and then cut: those of a model on one rank, whatever its experts are."""
    for case in (CASE, *GRAPHS):
        whole = case.whole_model()
        initialise(whole, case.config().run.seed)
        truth = {name: p.detach().float() for name, p in whole.named_parameters()}
        for starter in (None, lambda model: None):
            found = weights_of(built(world, mesh, case, starter), mesh)
            assert found.keys() == truth.keys()
            assert [name for name in truth if not torch.equal(found[name], truth[name])] == []


def check_a_starter_overwrites(world: World, mesh: Mesh) -> None:
    def start(model: Transformer) -> None:
        assert not any(isinstance(p, DTensor) for p in model.parameters()), "it knows plain tensors"
        with torch.no_grad():
            model.embedding_VD.fill_(0.25)

    engine = built(world, mesh, CASE, start)
    assert (weights_of(engine, mesh)["embedding_VD"] == 0.25).all()


def check_what_is_held(world: World, mesh: Mesh) -> None:
    """A share of each dense matrix, and of each expert's; nothing else before, between and after steps."""
    engine, layout = built(world, mesh, CASE), mesh.layout
    gradients = engine.gradients
    assert isinstance(gradients, ShardedGradients)
    for number in range(2):
        train(engine, mesh, CASE, number=number)
        engine.model.eval()
        with torch.no_grad():
            engine.model(CASE.batches()[0][0][:2])
        engine.model.train()
        engine.parts()
        for name, parameter in engine.model.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter is gradients.parameters[name], "the optimizer's"
            share = layout.expert_shard if ".experts." in name else layout.dp_shard
            if any(size % share == 0 for size in (parameter.shape[1:] if ".experts." in name else parameter.shape[:1])):
                assert parameter.to_local().numel() * share == parameter.numel(), name
    assert [p.shape[0] for n, p in engine.model.named_parameters() if ".experts." in n] == [4 // layout.ep] * 6


def check_norm_and_zeros(world: World, mesh: Mesh) -> None:
    """Gradients of ones for what is dense and twos for experts: a norm in closed form; None becomes zeros."""
    engine = built(world, mesh, CASE)
    engine.zero_grad()
    engine.gradients.reduce()
    count = {True: 0, False: 0}
    for name, parameter in engine.model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        assert not parameter.grad.to_local().any(), name
        is_expert = ".experts." in name
        parameter.grad.to_local().fill_(2.0 if is_expert else 1.0)
        count[is_expert] += parameter.numel() * (mesh.layout.ep if is_expert else 1)
    norm = engine.gradients.norm()
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx((count[False] + 4 * count[True]) ** 0.5, rel=1e-14)
    assert len(set(world.gather(norm.item()))) == 1
    engine.step(RATE, 1.5)
    assert engine.gradients.norm().item() == pytest.approx(1.5, rel=1e-6)


def check_refusal(world: World, mesh: Mesh) -> None:
    """One rank has a bad loss: all refuse the step, and nothing has changed anywhere."""
    engine = built(world, mesh, CASE)
    before = weights_of(engine, mesh)
    engine.zero_grad()
    size = float("nan") if world.rank == 1 else 1.0
    engine.backward(engine.model(CASE.batches()[0][0][:2]).logits_BSV.sum() * size, is_last=True)
    with pytest.raises(NonFiniteGradientError, match="embedding_VD"):
        engine.step(RATE, 1.0)
    after = weights_of(engine, mesh)
    assert all(torch.equal(after[name], before[name]) for name in before)


def check_the_bad_parameter_is_named(world: World, mesh: Mesh) -> None:
    """By the rank that has the part of it that is bad."""
    engine, bad = built(world, mesh, CASE), "blocks.1.ffn.experts.down_LFD"
    engine.zero_grad()
    engine.gradients.reduce()
    if world.rank == 1:
        dict(engine.model.named_parameters())[bad].grad.to_local().view(-1)[-1] = float("inf")
    assert engine.gradients.first_nonfinite() == (bad if world.rank == 1 else "")


def check_bf16(world: World, mesh: Mesh) -> None:
    """Experts travel in bf16 and are used so: the first step is that of whole weights but for the order of sums."""
    found = []
    for own in (build_mesh(world, mesh.layout.ep), mesh):
        engine = torch_engine(own, CASE, "bf16")
        norm = train(engine, own, CASE, accumulation=2)
        found.append((norm, gathered(engine.model, own, lambda p: p.grad)))
    (norm, gradients), (sharded_norm, sharded) = found
    assert sharded_norm == pytest.approx(norm, rel=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == sharded[name].dtype == torch.float32
        error = (sharded[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-2)
        assert error < 1e-5, f"{name} differs by {error:.1e}"


CHECKS = [check_first_values, check_a_starter_overwrites, check_what_is_held, check_norm_and_zeros, check_refusal,
          check_the_bad_parameter_is_named, check_bf16]  # fmt: skip


def run_checks(world: World) -> dict[str, str]:
    """What went wrong, by check and layout."""
    torch.set_num_threads(1)
    wrong = {}
    for ep, dp_shard in ((2, 4), (1, 2)):
        mesh = build_mesh(world, ep, dp_shard)
        for check in CHECKS:
            try:
                check(world, mesh)
            except AssertionError as error:
                wrong[f"{check.__name__} on {ep} x {dp_shard}"] = str(error) or "without words"
    return wrong


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, str]]:
    return run_ranks(run_checks, 4, timeout_s=240)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_on_four_ranks(wrong: list[dict[str, str]], check: Callable[[World, Mesh], None]) -> None:
    assert said_of(check, wrong) == []


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ((), None),
        (("train.precision=fp64",), None),
        (("train.precision=bf16",), torch.bfloat16),
        (("train.precision=bf16", "parallel.overlap=2"), None),
    ],
)
def test_experts_travel_cast_only_where_a_pass_uses_them_once(
    overrides: tuple[str, ...], dtype: torch.dtype | None
) -> None:
    assert gather_dtype(Case("", overrides).config()) == dtype
