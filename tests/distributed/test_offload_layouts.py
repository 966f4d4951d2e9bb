"""Experts on disk give the values and the text of those in memory, bit for bit, whoever holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from offload_samples import FAMILIES, loaded, logits_of, save_run
from spawn import run_ranks

from moe_train.config.schema import SampleConfig
from moe_train.dist.world import World
from moe_train.inference.load import Trained
from moe_train.inference.sampler import generate
from moe_train.models.transformer import PRECISIONS

SAMPLE = SampleConfig(temperature=1.0, max_tokens=6)


def text_of(trained: Trained, remember: bool) -> list[int]:
    return generate(trained.model, [84, 104, 101, 32], SAMPLE, 256, 24, remember)


def wrong_on(world: World, folder: Path, families: list[str], sizes: list[int]) -> list[str]:
    """What differs from the model in memory, or takes more of it than it may."""
    torch.set_num_threads(1)
    wrong = []
    for number, name in enumerate(families):
        for precision in ("fp32", "bf16"):
            run_dir = folder / f"{number}{precision}"
            save_run(run_dir, world, *FAMILIES[name], f"train.precision={precision}", ep=2)
            for ep in (1, 2):
                truth = loaded(run_dir, world, None, ep)
                values, texts = logits_of(truth), [text_of(truth, remember) for remember in (True, False)]
                layers = len([name for name, _ in truth.model.named_modules() if name.endswith("ffn.experts")])
                for cached in sizes:
                    found = loaded(run_dir, world, cached, ep)
                    case = f"{name}, {precision}, ep {ep}, {cached} cached"
                    if not torch.equal(logits_of(found), values):
                        wrong.append(f"{case}: logits")
                    if [text_of(found, remember) for remember in (True, False)] != texts:
                        wrong.append(f"{case}: text")
                    wrong += [f"{case}: {problem}" for problem in bounds(found, layers, cached, 8 // ep, precision)]
    return wrong


def bounds(found: Trained, layers: int, cached: int, held: int, precision: str) -> list[str]:
    """What is not as memory and traffic must be."""
    offloaded = found.offloaded
    assert offloaded is not None
    problems = []
    if len(offloaded.caches) != layers:
        problems.append(f"{len(offloaded.caches)} layers of {layers}")
    if any(name.endswith("_LDF2") for name, _ in found.model.named_parameters()):
        problems.append("experts are parameters of the model")
    if offloaded.buffers.made > layers * min(cached, held) + 1:
        problems.append(f"memory for {offloaded.buffers.made} experts")
    traffic = offloaded.traffic()
    if traffic.misses == 0 or traffic.read_bytes != traffic.misses * offloaded.expert_bytes:
        problems.append(f"{traffic}")
    if cached >= held and traffic.misses > layers * held:
        problems.append("read twice although there is room for all")
    itemsize = PRECISIONS[precision].activations.itemsize
    if offloaded.expert_bytes not in ((3 * 32 * 32) * itemsize, (3 * 32 * 32 + 2 * 32 + 32) * itemsize):
        problems.append(f"{offloaded.expert_bytes} bytes per expert")
    if f"{traffic.misses}" not in (line := offloaded.line()) and offloaded.world.size == 1:
        problems.append(line)
    return problems


def test_values_and_text_are_those_in_memory(tmp_path: Path) -> None:
    assert run_ranks(wrong_on, 2, tmp_path, ["two of eight"], [1, 8]) == [[], []]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_families_give_what_they_give_in_memory(tmp_path: Path) -> None:
    assert run_ranks(wrong_on, 2, tmp_path, list(FAMILIES), [1, 3, 8], timeout_s=500) == [[], []]
