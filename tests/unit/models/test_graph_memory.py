"""Peak memory of a step of a model of dense experts, measured: plain, recomputed, recomputed in chunks."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_samples import build, config_of

BATCH, LENGTH, G = 4, 64, "model.ffn.graph"
SIZES = (
    "model.dim=32", "model.layers=4", "model.attention.kv_heads=4", "model.ffn.num_experts=8",
    "model.ffn.expert_dim=64",
)  # fmt: skip
PRESETS = pytest.mark.parametrize("preset", ["graph_tiny", "graph_block_tiny"])

SCRIPT = """
import json, os, sys
import torch
from torch.utils.checkpoint import checkpoint
from model_samples import build, config_of

BATCH, LENGTH, G = 8, 128, "model.ffn.graph"
SIZES = (sys.argv[1], "model.dim=128", "model.layers=4", "model.heads=4", "model.attention.kv_heads=4",
         "model.ffn.num_experts=8", "model.ffn.expert_dim=256", "model.init_std=0.05")
WAYS = {"plain": (), "recompute": (f"{G}.recompute=true",),
        "recompute, chunks": (f"{G}.recompute=true", f"{G}.chunk_tokens={LENGTH}")}

def mib(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1024

def step(model, batch):
    tokens_BS = torch.arange(batch * LENGTH).view(batch, LENGTH) % 23
    model(tokens_BS).logits_BSV.square().mean().backward()

def peak(words):
    model = build(config_of(*SIZES, *words), "fp32")
    step(model, 1)  # makes the gradients, and whatever torch makes only once
    before = mib("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    step(model, BATCH)
    return mib("VmHWM") - before

checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False)  # imports what it needs
for way, words in WAYS.items():
    if os.fork() == 0:  # a process of its own for each, without importing torch again
        print(json.dumps([way, peak(words)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def peaks_of(preset: str) -> dict[str, float]:
    """MiB that a step needs beside the model and its gradients, by the way it is computed."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from /proc")
    # Tensors go back to the system when they are freed, so that what is resident is what is alive.
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "32768", "CUDA_VISIBLE_DEVICES": ""}
    env = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT, f"model={preset}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    print(preset, {way: f"{mib:.0f} MiB" for way, mib in found.items()})
    return found


def allocated(preset: str, *words: str) -> float:
    """MiB at the peak of a step, every tensor counted that torch makes and frees; model and gradients are not."""
    model = build(config_of(f"model={preset}", *SIZES, *(f"{G}.{word}" for word in words)), "fp32")
    tokens_BS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 23
    model(tokens_BS[:1]).logits_BSV.square().mean().backward()  # makes the gradients
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model(tokens_BS).logits_BSV.square().mean().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert alive[-1] == 0, "what a step makes it frees"
    return max(alive) / 2**20


@PRESETS
def test_recompute_and_chunks_bound_what_is_allocated(preset: str) -> None:
    """Four layers, eight experts: recomputed, one layer is alive at a time; in chunks, a quarter of one.

    The rest is the same in all: inputs of layers, attention that is no part of an expert, sums of gradients.
    """
    plain, recomputed = allocated(preset), allocated(preset, "recompute=true")
    chunked = allocated(preset, "recompute=true", f"chunk_tokens={LENGTH}")
    print(f"{preset}: plain {plain:.1f} MiB, recomputed {recomputed:.1f} MiB, in chunks {chunked:.1f} MiB")
    assert plain > 2.5 * recomputed
    assert recomputed > 2.0 * chunked
    assert plain > 5.0 * chunked


def test_chunks_alone_bound_nothing() -> None:
    """What every chunk keeps for the backward pass adds up."""
    assert allocated("graph_tiny", f"chunk_tokens={LENGTH}") > 0.9 * allocated("graph_tiny")


@pytest.mark.slow
@PRESETS
def test_recompute_and_chunks_bound_the_resident_memory(preset: str) -> None:
    """The same as the operating system sees it, in processes of their own and with larger tensors."""
    peaks = peaks_of(preset)
    plain, recomputed, chunked = peaks["plain"], peaks["recompute"], peaks["recompute, chunks"]
    assert plain > 2.5 * recomputed, peaks
    assert recomputed > 2.0 * chunked, peaks
    assert plain > 5.0 * chunked, peaks
