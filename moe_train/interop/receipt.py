"""Proof that an exported folder is the model: its files are read back, and transformers computes the same logits."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from moe_train.dist.world import World
from moe_train.errors import CheckpointError, Problem
from moe_train.interop.folder import PublicFolder
from moe_train.interop.load import Expected, check, fill
from moe_train.interop.pieces import held_of
from moe_train.models.transformer import Transformer

LARGEST_DIFFERENCE = 1e-4
"""Of the logits, relative to the largest one. Both sides compute in fp32 with the weights of the files, so that the
rounding of the weights to bf16, which can change the choice of experts, does not come in."""
PROMPT_TOKENS = 64
BYTES_PER_PARAMETER = 5
"""That transformers needs beside the model of the run, with some room: fp32."""


@dataclass(frozen=True)
class Receipt:
    """What was compared.

    Attributes:
        difference: largest difference of the logits in transformers, relative to the largest logit; None: not compared.
        why_not: why it was not compared.
    """

    difference: float | None
    why_not: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"the files were read back and hold the run's weights; logits were not compared: {self.why_not}"
        return (
            "the files were read back and hold the run's weights; logits in transformers differ by at most "
            f"{self.difference:.1e} of the largest"
        )


def verify(
    folder: Path, expected: Expected, model: Transformer, dtype: torch.dtype, is_public: bool, world: World
) -> Receipt:
    """Compare a folder with the model that was written into it. Collective.

    Args:
        folder: what was written.
        expected: the table that it was written with.
        model: the run's, in evaluation mode; afterwards it has the weights of the files, rounded as they are.
        dtype: of the weights in the files.
        is_public: whether a class of transformers should load it.
        world: the processes; all compute the run's logits together.

    Raises:
        CheckpointError: on all ranks; the files do not hold the weights, or transformers does not load
            them, or computes something else.
    """
    held = held_of(model)
    opened = PublicFolder.open(folder)
    check(held, expected, opened, world, dtype)
    why_not = cast(str, world.broadcast(obstacle(opened, is_public)))
    if why_not:
        return Receipt(None, why_not)
    fill(held, expected, opened, world)
    tokens_BS = prompt(model.embedding_VD.shape[0], opened)
    with torch.no_grad(), computing_in_fp32(model):
        ours_SV = model(tokens_BS.to(world.device)).logits_BSV[0].to("cpu", torch.float64)
    found: list[float] = []
    world.leader_first(lambda: found.append(distance(folder, tokens_BS, ours_SV, expected)))
    difference = cast(float, world.broadcast(found[0] if found else None))
    # Not "<=": a difference that is not a number is none that was found small.
    if not difference <= LARGEST_DIFFERENCE:
        rule = f"logits in transformers differ from the run's by {difference:.1e} of the largest, so it was removed"
        raise CheckpointError(Problem(str(folder), None, rule, "report this with the run's config.yaml"))
    return Receipt(difference)


def obstacle(folder: PublicFolder, is_public: bool) -> str:
    """Return why transformers cannot compute logits here; empty when it can."""
    if not is_public:
        return "no class of transformers loads this layout"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    need = BYTES_PER_PARAMETER * sum(torch.Size(shape).numel() for shape in folder.shapes.values())
    free = psutil.virtual_memory().available
    return f"that takes {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free" if need > free else ""


def prompt(vocab_size: int, folder: PublicFolder) -> Tensor:
    """Return tokens [1, S] of the vocabulary, the same each time."""
    length = min(PROMPT_TOKENS, int(folder.config["max_position_embeddings"]))
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def computing_in_fp32(model: Transformer) -> Iterator[None]:
    """Let activations be fp32 where they are bf16."""
    usual = model.dtype
    model.dtype = torch.promote_types(usual, torch.float32)
    try:
        yield
    finally:
        model.dtype = usual


def distance(folder: Path, tokens_BS: Tensor, ours_SV: Tensor, expected: Expected) -> float:
    """Return the largest difference of the logits in transformers from ours, relative to our largest.

    Args:
        folder: what was written.
        tokens_BS: [1, S] prompt.
        ours_SV: [S, V] fp64 logits of the run.
        expected: the table: it says which tensors transformers may pass over.

    Raises:
        CheckpointError: transformers finds tensors missing or left over.
    """
    # By name: the package is heavy, optional, and has no place in the types of this one.
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its report of tensors is looked at here
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    # Multi-token prediction serves training, and transformers loads it only when asked.
    report["unexpected_keys"] = [key for key in report["unexpected_keys"] if not expected.is_beyond_the_layers(key)]
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        rule = f"transformers does not find what it expects: {faults}; it was removed"
        raise CheckpointError(Problem(str(folder), None, rule, "report this with the run's config.yaml"))
    with torch.no_grad():
        theirs_SV = model.eval()(tokens_BS, use_cache=False).logits[0].double()
    del model
    gc.collect()
    return float((theirs_SV - ours_SV).abs().max() / ours_SV.abs().max())
