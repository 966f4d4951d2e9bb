"""An export from beginning to end: the family, the weights, what stands beside them, the proof."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_train.checkpoint.agreement import on_leader
from moe_train.checkpoint.files import write_synced
from moe_train.config.model import ModelConfig
from moe_train.config.schema import ExportConfig, TrainConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.errors import ConfigError, Problem
from moe_train.interop.card import model_card
from moe_train.interop.companions import companions
from moe_train.interop.families import expressed_by
from moe_train.interop.families.base import Family
from moe_train.interop.load import expected_of
from moe_train.interop.native import NATIVE
from moe_train.interop.pieces import held_of
from moe_train.interop.receipt import Receipt, verify
from moe_train.interop.save import Written, write
from moe_train.interop.target import appearing, free_problems
from moe_train.models.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """What a model is written as.

    Attributes:
        family: the table.
        reasons: why no public class expresses the model, one line each; empty when one does or none was asked for.
    """

    family: Family
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        config: of the training.
        tokenizer: of the training.
        model: with its weights, in evaluation mode, as this rank holds it.
        mesh: the layout that it is held in.
        run_dir: folder of the run.
        step: optimizer steps that the weights have seen.
    """

    config: TrainConfig
    tokenizer: Tokenizer
    model: Transformer
    mesh: Mesh
    run_dir: Path
    step: int


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Attributes:
        written: the files of the weights.
        receipt: what was compared; None when nothing was asked for.
    """

    written: Written
    receipt: Receipt | None


def preflight(config: ExportConfig, model: ModelConfig) -> Choice:
    """Decide what to write, before anything is loaded.

    Raises:
        ConfigError: the target is taken, or no public class expresses the model although one was asked for.
    """
    problems = free_problems(Path(config.to).expanduser())
    found = NATIVE if config.format == "moe_train" else expressed_by(model)
    if isinstance(found, list) and config.format == "huggingface":
        problems += list(refusal_problems(found))
    if problems:
        raise ConfigError(problems)
    return Choice(NATIVE, tuple(found)) if isinstance(found, list) else Choice(found)


def refusal_problems(reasons: Iterable[str]) -> Iterator[Problem]:
    """Yield a problem for each family with all of its reasons, from lines ``family: reason``."""
    remedy = "change the model, or export it in the project's own layout with format=moe_train"
    by_family: dict[str, list[str]] = {}
    for line in reasons:
        family, _, reason = line.partition(": ")
        by_family.setdefault(family, []).append(reason)
    for family, own in by_family.items():
        yield Problem("format", "huggingface", f"{family} cannot be this model: {'; '.join(own)}", remedy)


def publish(config: ExportConfig, choice: Choice, subject: Subject, world: World) -> Exported:
    """Write the folder. Collective.

    With ``verify``, the model has the weights of the files afterwards, rounded as they are.

    Raises:
        CheckpointError: on all ranks; nothing is left behind.
    """
    trained, tokenizer = subject.config, subject.tokenizer
    vocab_size = subject.model.embedding_VD.shape[0]
    dtype = config.dtype or ("bf16" if trained.train.precision == "bf16" else "fp32")
    table = expected_of(choice.family, trained.model, vocab_size)
    with appearing(Path(config.to).expanduser(), world) as folder:
        held = held_of(subject.model)
        written = write(held, table, folder, subject.mesh, world, DTYPES[dtype], config.shard_bytes)

        def write_companions() -> None:
            files = companions(choice.family, trained, tokenizer, subject.run_dir / "tokenizer.json", dtype)
            card = model_card(choice.family, trained, vocab_size, subject.step, subject.run_dir)
            for name, content in {**files, "README.md": card.encode()}.items():
                write_synced(folder / name, content)

        on_leader(world, "writing what stands beside the weights", write_companions)
        is_public = choice.family is not NATIVE
        receipt = verify(folder, table, subject.model, DTYPES[dtype], is_public, world) if config.verify else None
    return Exported(written, receipt)
