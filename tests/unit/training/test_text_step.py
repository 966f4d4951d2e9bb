"""Steps and evaluations over whole texts: what is counted, what the configuration learns from the texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moe_train.config.compose import compose_config
from moe_train.config.rules import train_problems
from moe_train.config.schema import TrainConfig
from moe_train.data.loader import Batch
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.errors import ConfigError
from moe_train.models.initialise import initialise
from moe_train.models.transformer import build_model
from moe_train.moe.exchange import LocalExchange
from moe_train.ops.loss import IGNORE
from moe_train.training.judge import confusion
from moe_train.training.loop import StepSize, Window, next_batches
from moe_train.training.step import to_inputs, valid_of
from moe_train.training.tasks import Task, open_task
from moe_train.training.tasks.sentiment import Classification

TINY = [
    "task=sentiment", "data=labelled", "data.seq_len=8", "tokenizer=bytes", "model.dim=8", "model.heads=2",
    "model.attention.kv_heads=2", "model.ffn.expert_dim=8", "train.global_batch=4", "data.heldout_fraction=0.25",
]  # fmt: skip
WORLD = World(0, 1, torch.device("cpu"), 30.0)
ROWS = ["ab,good", "abc,good", "b,bad", "bb,bad", "abcabc,good", "bcb,bad", "aabbaabbaabb,good", "bab,bad"]


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    path = folder / "texts.csv"
    path.write_text("\n".join(["text,label", *ROWS]) + "\n")
    words = [*TINY, f"data.path={path}", f"data.cache_dir={folder / 'cache'}", *overrides]
    return compose_config("train", TrainConfig, train_problems, words)


def here(work: Callable[[], object]) -> None:
    """What a leader does first, without others."""
    work()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return open_task(config_of(tmp_path), here)


def text_batch() -> Batch:
    """Two texts of 3 and 1 tokens, and a row without one."""
    labels_BS = torch.full((3, 4), IGNORE)
    labels_BS[0, 2], labels_BS[1, 0] = 1, 0
    valid_BS = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    return Batch(torch.zeros(3, 4, dtype=torch.int64), labels_BS, 0, valid_BS)


def test_a_step_counts_texts_and_tokens() -> None:
    language = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[5, 6, IGNORE, IGNORE]]), 0)
    assert valid_of(language).tolist() == [[True, True, False, False]]
    for batch, size in ((text_batch(), StepSize(2, 4)), (language, StepSize(2, 2))):
        loader = SimpleNamespace(next_step=lambda batch=batch: [batch, batch])
        run = SimpleNamespace(loader=loader, world=SimpleNamespace(sum_on_host=torch.Tensor.clone))
        _, found, _ = next_batches(cast("Any", run), cast("Any", SimpleNamespace(signal=None)), Window())
        assert found == StepSize(2 * size.targets, 2 * size.tokens)


def test_the_context_knows_padding_and_classes(task: Task, lone_mesh: Mesh) -> None:
    model = build_model(task.config.model, 257, LocalExchange(4), "fp32", torch.device("cpu"))
    context = to_inputs(text_batch(), model, lone_mesh, seed=0).context
    assert context.valid_BS is not None and context.valid_BS.sum(dim=1).tolist() == [3, 1, 0]
    assert context.classes_B is not None and context.classes_B.tolist() == [1, 0, IGNORE]
    assert context.num_classes == 2


def test_rows_are_true_classes_and_columns_told_ones() -> None:
    logits_BC = torch.tensor([[1.0, 2, 0], [3, 1, 0], [0, 1, 5], [0, 1, 5], [9, 0, 0]])
    found = confusion(logits_BC, torch.tensor([0, 0, 2, 1, IGNORE]))
    assert found.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_the_texts_complete_the_configuration(task: Task) -> None:
    assert isinstance(task, Classification) and task.texts.classes == ("bad", "good")
    assert task.config.task.model_dump() == {"kind": "sentiment", "classes": ("bad", "good")}
    assert task.config.model.classifier is not None and task.config.model.classifier.num_classes == 2
    assert not task.writes_text and "2 classes (bad, good)" in task.told_size()
    assert task.tokens_after(10) == round(40 * task.texts.train.num_tokens / task.texts.train.num_texts)


def test_a_completed_configuration_opens_the_same_texts(task: Task) -> None:
    """The run's config.yaml names the classes: going on and evaluating must find what was prepared."""
    again = open_task(task.config, here)
    assert again.config == task.config and again.texts.fingerprint == task.texts.fingerprint


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_classes=3: the texts have 2 classes: bad, good"):
        open_task(config_of(tmp_path, "model.classifier.num_classes=3"), here)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_held_out_text_is_judged_once(task: Task, lone_mesh: Mesh, batch: int) -> None:
    """Whatever the batch; the same figures, in which each text is in one cell of the confusion matrix."""
    model = build_model(task.config.model, 257, LocalExchange(4), "fp64", torch.device("cpu"))
    initialise(model, 0)
    found = task.evaluate(model, WORLD, lone_mesh, batch, None)
    whole = task.evaluate(model, WORLD, lone_mesh, 2, None)
    assert found["eval_texts"] == sum(map(sum, found["confusion"])) == 2
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-12)
    assert found["confusion"] == whole["confusion"]
    assert found["moe/layer_00/by_class"] == whole["moe/layer_00/by_class"]
    assert model.training, "training goes on as it was"
    assert task.closing(found)[0].startswith("held-out accuracy") and len(task.closing(found)) == 2
