"""Text from a model: greedy, or sampled from the most probable tokens.

All ranks of a layout with sharded experts decode together: the same prompt, the same number of forward passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.config.routing import FactorCapacityConfig
from moe_train.config.schema import SampleConfig
from moe_train.models.memory import TextMemory
from moe_train.models.transformer import Transformer


def can_remember(config: ModelConfig) -> bool:
    """Return whether a model may read a text piece by piece: what it makes of a token must not depend on the piece.

    Two kinds of model must see the whole text at once. Experts that are whole blocks (graph.expert=block) each have an
    attention of their own, and a memory has room for one per block. Limits of capacity that hold in evaluation, too
    (capacity.eval_factor), are shares of all tokens that are read together: a token that comes alone always finds room.
    """
    ffn = config.ffn
    if ffn.num_experts == 0:
        return True
    if ffn.graph is not None:
        return ffn.graph.expert != "block"
    return not (isinstance(ffn.capacity, FactorCapacityConfig) and ffn.capacity.eval_factor is not None)


class Reader:
    """Reads a text that grows at its end, and scores its next token.

    The prompt is read once, then each new token alone, with keys and values of all before it. A text longer than the
    context loses its oldest tokens. All later ones have seen those, and get new positions without them: from then on
    the last ``context`` tokens are read anew for every token, as without memory.

    Args:
        model: as this rank holds it, in evaluation mode.
        context: most tokens that are read together.
        remember: whether to keep keys and values; the model must be one that can (`can_remember`).
    """

    def __init__(self, model: Transformer, context: int, remember: bool) -> None:
        self.model = model
        self.context = context
        self.memory = TextMemory(len(model.blocks)) if remember else None

    def scores(self, text_S: list[int]) -> Tensor:
        """Return the scores of the token after a text that continues the last one: [V] fp64, on the CPU."""
        if len(text_S) > self.context:
            self.memory = None
        unread_S = text_S[-self.context :] if self.memory is None else text_S[self.memory.length :]
        tokens_BS = torch.tensor([unread_S], device=self.model.embedding_VD.device)
        logits_V: Tensor = self.model(tokens_BS, memory=self.memory).logits_BSV[0, -1]
        return logits_V.to("cpu", torch.float64)


@torch.no_grad()
def generate(
    model: Transformer, prompt_S: list[int], config: SampleConfig, boundary: int, context: int, remember: bool = True
) -> list[int]:
    """Return the tokens that continue a prompt, up to a document boundary or ``config.max_tokens``.

    Args:
        model: as this rank holds it; dropout of assignments is off (capacity limits need not hold at inference).
        prompt_S: token ids, at least one.
        config: number of tokens, temperature, top_p and seed. The same seed gives the same text on every layout.
        boundary: id of the token that ends a document; it ends the text and is not returned.
        context: longest text that the model was trained on, in tokens; older ones are forgotten.
        remember: whether keys and values are kept while the text fits into the context, where the model can
            (`can_remember`); false: the whole text is read for every token. The text is the same but for rounding.
    """
    assert prompt_S, "a prompt needs at least one token"
    generator = torch.Generator().manual_seed(config.seed)
    was_training = model.training
    model.eval()
    text_S = list(prompt_S)
    if model.config.max_positions is not None:
        context = min(context, model.config.max_positions)  # beyond them a model with learned positions has none
    reader = Reader(model, context, remember and can_remember(model.config))
    ended_at: int | None = None
    # Each token meets other lengths than the one before: a model that is compiled for training would compile for them.
    with torch.compiler.set_stance("force_eager"):
        for _ in range(config.max_tokens):
            text_S.append(choose(reader.scores(text_S), config, generator))
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
