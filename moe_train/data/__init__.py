"""Text to batches: sources of documents, tokenizer, token files prepared once, and a loader whose order is layout-free.

The way of a document: ``sources`` gives it, ``survey`` puts it into a split, ``encode`` writes its tokens to a shard,
``store`` finds them again, ``loader`` cuts them into batches. ``corpus.open_corpus`` is the way in for training and
``pack.prepare`` for the command line. Only ``loader`` needs torch. Texts with classes go another way: see ``labelled``.
"""
