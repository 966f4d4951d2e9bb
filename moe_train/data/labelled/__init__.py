"""Texts with classes: from a source of examples to batches of whole texts, a text per sequence.

The way of an example: ``sources`` gives it, ``collect`` finds its class and drops copies, ``split`` chooses its side,
``prepare`` writes its tokens, ``store`` finds them again, ``loader`` pads them into batches. ``corpus.open_labelled``
is the way in. Only ``loader`` needs torch.
"""

from moe_train.data.labelled.corpus import LabelledCorpus, open_labelled

__all__ = ["LabelledCorpus", "open_labelled"]
