"""Text from a model: greedy, or sampled from the most probable tokens.

All ranks of a layout with sharded experts decode together: the same prompt, the same number of forward passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config.schema import SampleConfig
from moe_train.models.transformer import Transformer


@torch.no_grad()
def generate(model: Transformer, prompt_S: list[int], config: SampleConfig, boundary: int, context: int) -> list[int]:
    """Return the tokens that continue a prompt, up to a document boundary or ``config.max_tokens``.

    Every step reads the whole text again: simple, exact for every kind of layer, and fast enough for samples.

    Args:
        model: as this rank holds it; dropout of assignments is off (capacity limits need not hold at inference).
        prompt_S: token ids, at least one.
        config: number of tokens, temperature, top_p and seed. The same seed gives the same text on every layout.
        boundary: id of the token that ends a document; it ends the text and is not returned.
        context: longest text that the model was trained on, in tokens; older ones are forgotten.
    """
    assert prompt_S, "a prompt needs at least one token"
    generator = torch.Generator().manual_seed(config.seed)
    was_training = model.training
    model.eval()
    text_S = list(prompt_S)
    if model.config.max_positions is not None:
        context = min(context, model.config.max_positions)  # beyond them a model with learned positions has none
    ended_at: int | None = None
    for _ in range(config.max_tokens):
        tokens_BS = torch.tensor([text_S[-context:]], device=model.embedding_VD.device)
        logits_V = model(tokens_BS).logits_BSV[0, -1].to("cpu", torch.float64)
        text_S.append(choose(logits_V, config, generator))
        # The others may still exchange tokens with this rank: the text ends, the passes go on.
        if text_S[-1] == boundary and ended_at is None:
            ended_at = len(text_S) - 1
    model.train(was_training)
    return text_S[len(prompt_S) : ended_at]


def choose(logits_V: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """Return the next token.

    Args:
        logits_V: [V] fp64 scores on the CPU.
        config: temperature 0 takes the best; else nucleus sampling (arXiv 1904.09751): from the smallest set of most
            probable tokens whose probability reaches top_p.
        generator: of the draw.
    """
    if config.temperature == 0.0:
        return int(logits_V.argmax())
    probabilities_V, order_V = (logits_V / config.temperature).softmax(dim=0).sort(descending=True, stable=True)
    before_V = probabilities_V.cumsum(dim=0) - probabilities_V
    nucleus_V = torch.where(before_V < config.top_p, probabilities_V, 0.0)
    return int(order_V[torch.multinomial(nucleus_V, 1, generator=generator)])
