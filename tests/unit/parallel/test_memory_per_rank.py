"""What a rank keeps, from the configuration alone, is what it keeps (within a tenth)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from layout_cases import TEXTS
from layouts import VOCAB, Case, rank_batches
from spawn import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_train.dist.mesh import Layout, build_mesh
from moe_train.dist.world import World
from moe_train.models.counts import count
from moe_train.moe.exchange import exchange_for
from moe_train.parallel.build import build_engine
from moe_train.parallel.memory import memory_per_rank, values_of_model
from moe_train.training.optim import build_optimizer
from moe_train.training.step import StepSettings, train_step

SIZES = ("model.dim=32", "model.heads=4", "model.ffn.expert_dim=24", "model.ffn.hidden_dim=48",
         "model.init_std=0.02", "train.precision=bf16")  # fmt: skip
CASES = [
    Case("routed, shared expert, first dense, a module ahead",
         (*SIZES, "model.layers=3", "model.ffn.first_dense=1", "model.ffn.num_shared_experts=1",
          "model.ffn.num_experts=8", "model.mtp.depth=1", "model.vocab_size=32")),
    Case("experts in attention, too",
         (*SIZES, "model.attention.kind=switchhead", "model.attention.experts=6", "model.ffn.num_experts=8",
          "model.layers=2", "model.vocab_size=32")),
    Case("graph of networks", ("model=graph_tiny", *SIZES, "model.layers=1", "model.tie_embeddings=false")),
    Case("graph of blocks", ("model=graph_block_tiny", *SIZES, "model.layers=1")),
]  # fmt: skip
LAYOUTS = [(ep, dp_shard) for ep in (1, 2, 4) for dp_shard in (1, 2, 4)]


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of all different storages."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def watch_gathered(model: nn.Module) -> list[int]:
    """Notes the bytes of all plain parameters whenever an activation of an expert or of a dense network is due."""
    seen = [0]

    def note(*_: object) -> None:
        plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
        seen.append(storage_bytes(plain))

    for name, module in model.named_modules():
        if name.endswith((".experts", ".down")):
            module.register_forward_hook(note)
            # Before the hook of torch that drops them.
            module._forward_hooks.move_to_end(next(reversed(module._forward_hooks)), last=False)
    return seen


def measured(world: World) -> dict[tuple[str, int, int], tuple[int, int, int, int]]:
    """Bytes of weights, gradients, moments and gathered weights, by case and layout."""
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        config = case.config()
        vocab_size = config.model.vocab_size or VOCAB
        for ep, dp_shard in LAYOUTS:
            mesh = build_mesh(world, ep, dp_shard)
            exchange = exchange_for(mesh, config.model.ffn.num_experts, False)
            make_optimizer = partial(build_optimizer, config=config.optim)
            engine = build_engine(config, mesh, world, exchange, vocab_size, make_optimizer, None)
            gathered = watch_gathered(engine.model) if dp_shard > 1 else [0]
            batch = rank_batches(case.batches()[0], world.rank, world.size, 1)
            train_step(engine, mesh, batch, 96, StepSettings(1e-3, 1.0, seed=0))
            parameters = list(engine.model.parameters())
            moments = [engine.optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
            gradients = [p.grad for p in parameters]
            kept = (storage_bytes(list(tensors)) for tensors in (parameters, gradients, moments))
            found[case.name, ep, dp_shard] = (*kept, max(gathered))
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str, int, int], tuple[int, int, int, int]]]:
    return run_ranks(measured, 4, timeout_s=240)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_of_four_ranks(by_rank: list[dict[tuple[str, int, int], tuple[int, ...]]], case: Case) -> None:
    config = case.config()
    for ep, dp_shard in LAYOUTS:
        said = memory_per_rank(config.model, VOCAB, Layout(4, ep, dp_shard), "bf16")
        told = (said.weights_bytes, said.gradients_bytes, said.optimizer_bytes, said.gathered_bytes)
        for rank, found in enumerate(by_rank):
            assert found[case.name, ep, dp_shard] == pytest.approx(told, rel=0.1), f"rank {rank}, {ep} x {dp_shard}"
        assert said.state_bytes == sum(told[:3])


@pytest.mark.parametrize("case", [*CASES, *TEXTS], ids=str)
def test_experts_and_the_rest_are_the_model(case: Case) -> None:
    model = case.whole_model()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    config = case.config().model.model_copy(update={"vocab_size": None})  # its rows are those of the test's text
    found = values_of_model(config, VOCAB)
    assert found.experts == experts
    assert found.dense == sum(p.numel() for p in model.parameters()) - experts
    assert found.dense + found.experts == count(config, VOCAB, 1).total
