"""Held-out evaluation: loss, perplexity and bits per byte, the same on every layout."""

from __future__ import annotations

import math

import torch

from moe_train.data.loader import heldout_batches
from moe_train.data.store import TokenStore
from moe_train.dist.mesh import Mesh
from moe_train.dist.world import World
from moe_train.models.transformer import Transformer
from moe_train.moe.foresight import foresighted, looking_ahead
from moe_train.ops.loss import IGNORE
from moe_train.training.step import to_inputs


@torch.no_grad()
def evaluate(
    model: Transformer, store: TokenStore, world: World, mesh: Mesh, seq_len: int, batch: int, limit: int | None
) -> dict[str, float]:
    """Return the figures of a record of kind ``eval``. Collective; balance losses are left out.

    The loss is the causal one: what generation will do. Where a layer could choose with knowledge of later tokens, as
    in training, the same batches are scored so, too.

    Args:
        model: as this rank holds it; training mode is restored afterwards.
        store: held-out tokens.
        world: the processes.
        mesh: their groups.
        seq_len: positions per sequence.
        batch: sequences per rank and forward pass.
        limit: forward passes; None: the whole split.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``bits_per_byte`` of the text, and ``unigram_bits_per_byte``: the
        entropy of the split's own token frequencies, which no model without context can beat. With foresighted layers
        ``loss_looking_ahead`` and ``bits_per_byte_looking_ahead``, which no generation reaches.
    """
    was_training = model.training
    model.eval()
    loss, tokens = heldout_loss(model, store, world, mesh, seq_len, batch, limit)
    bits_per_nat = store.num_tokens / store.num_bytes / math.log(2)
    figures = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * bits_per_nat,
        "unigram_bits_per_byte": store.unigram_entropy_bits_per_byte(),
        "eval_tokens": tokens,
    }
    if foresighted(model):
        with looking_ahead(model):
            ahead, _ = heldout_loss(model, store, world, mesh, seq_len, batch, limit)
        figures |= {"loss_looking_ahead": ahead, "bits_per_byte_looking_ahead": ahead * bits_per_nat}
    model.train(was_training)
    return figures


def heldout_loss(
    model: Transformer, store: TokenStore, world: World, mesh: Mesh, seq_len: int, batch: int, limit: int | None
) -> tuple[float, int]:
    """Return the mean loss in nats per token, and the number of tokens; see `evaluate`. Collective.

    Every rank runs the same number of forward passes, padded where text is missing, so that no exchange hangs.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for window in heldout_batches(store, seq_len, batch, world.rank, world.size, limit):
        inputs = to_inputs(window, model, mesh, seed=0)  # nothing is drawn in evaluation
        sums[0] += model(inputs.tokens_BS, inputs.context, [inputs.labels_BS]).loss_sums[0].cpu()
        sums[1] += int((window.labels_BS != IGNORE).sum())
    loss_sum, tokens = world.sum_on_host(sums).tolist()
    return loss_sum / tokens, int(tokens)
