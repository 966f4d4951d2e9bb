"""Held-out evaluation of a classifier: how often it is right, and which expert took which class."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.data.labelled.loader import heldout_texts
from moe_train.data.labelled.store import TextStore
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.models.transformer import Transformer
from moe_train.observe.classes import OF_CLASSES, Verdicts
from moe_train.observe.records import ROUTED
from moe_train.ops.loss import cross_entropy_sum
from moe_train.training.step import to_inputs
from moe_train.training.tally import Tally


@torch.no_grad()
def judge(
    model: Transformer,
    store: TextStore,
    classes: tuple[str, ...],
    world: World,
    mesh: Mesh,
    seq_len: int,
    batch: int,
    limit: int | None,
) -> dict[str, object]:
    """Return the figures of a record of kind ``eval``. Collective; balance losses and dropout are left out.

    Every rank runs the same number of forward passes, padded where texts are missing, so that no exchange hangs.

    Args:
        model: a classifier as this rank holds it; training mode is restored afterwards.
        store: held-out texts.
        classes: their names, in the order of their numbers.
        world: the processes.
        mesh: their groups.
        seq_len: most tokens of a text.
        batch: texts per rank and forward pass.
        limit: forward passes; None: all texts.

    Returns:
        ``loss`` in nats per text, the fields of `Verdicts`, ``confusion`` (rows: true classes, columns: told ones),
        ``classes``, ``eval_texts``; per layer with experts ``moe/LAYER/...`` of `OF_CLASSES`, and ``load``.
    """
    was_training = model.training
    model.eval()
    tally = Tally(model.expert_layers)
    confusion_CC = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    for texts in heldout_texts(store, seq_len, batch, world.rank, world.size, limit):
        inputs = to_inputs(texts, model, mesh, seed=0)  # nothing is drawn in evaluation
        output = model(inputs.tokens_BS, inputs.context)
        labels_B = inputs.labels_BS.amax(dim=1)
        tally.add(cross_entropy_sum(output.logits_BC, labels_B), output.records)
        confusion_CC += confusion(output.logits_BC, labels_B).cpu()
    model.train(was_training)
    counts = [[int(count) for count in row] for row in world.sum_on_host(confusion_CC).tolist()]
    texts_judged = sum(map(sum, counts))
    measured = tally.measure(texts_judged, mesh)
    of_layers = {key: value for key, value in measured.items() if key.rpartition("/")[2] in (*OF_CLASSES, ROUTED)}
    verdicts = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(Verdicts.of(counts)).items()}
    told = {"confusion": counts, "classes": list(classes), "eval_texts": texts_judged}
    return {"loss": measured["loss"], **verdicts, **told, **of_layers}


def confusion(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return how many texts of each class (rows) were told to be of each (columns): [C, C] int64.

    Args:
        logits_BC: [B, C] scores; the largest is what is told.
        labels_B: [B] int64 true classes; negative where a row holds no text.
    """
    num_classes = logits_BC.shape[1]
    is_text_B = labels_B >= 0
    places = labels_B[is_text_B] * num_classes + logits_BC.argmax(dim=1)[is_text_B]
    return torch.bincount(places, minlength=num_classes**2).view(num_classes, num_classes)
