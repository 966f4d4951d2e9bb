"""The keys of a model that tells the class of a text instead of the next token."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

from moe_train.config.base import Fraction, Strict

Pool: TypeAlias = Literal["mean", "root"]
"""How vectors of tokens become one of a text."""


class NgramConfig(Strict):
    """Vectors of runs of tokens, hashed into one table and added to the vector of a run's last token.

    fastText, arXiv 1607.01759, section 2.2: so models that are small, or read no context, tell "not good" from "good".
    """

    longest: Annotated[int, Field(ge=2, le=4)] = 2
    """Tokens of the longest runs; all lengths from 2 on are there."""
    rows: PositiveInt = 65536
    """Rows of the table; runs whose hashes meet share one."""
    scale: PositiveFloat = 0.15
    """Multiplies the vectors. Adam moves a row by about the learning rate whenever its run occurs, however rarely that
    is: with less than 1 what is rare is learnt by heart more slowly."""


class NaiveBayesConfig(Strict):
    """Scores of the classes from single tokens and runs, each scaled by its log-count ratio, beside those of the head.

    NBSVM: Wang and Manning 2012, "Baselines and Bigrams", section 2.2. The ratios are those of the run's own training
    texts, their first data.seq_len tokens.
    """

    longest: Annotated[int, Field(ge=1, le=4)] = 2
    """Tokens of the longest runs; all lengths from 1 on are there."""
    rows: PositiveInt = 1048576
    """Rows of the table; runs whose hashes meet share one."""
    smoothing: PositiveFloat = 1.0
    """What is added to each count of texts: the smaller it is, the more a rare run says."""
    scale: PositiveFloat = 4.0
    """Multiplies the scores: with Adam, how much faster they are learnt than the rest of the model."""


class LexiconConfig(Strict):
    """Scores of the classes from words that people have rated, beside those of the head.

    A text's positive ratings and its negative ones are summed, and each sum has a weight per class that is learnt.
    """

    path: str | None = None
    """A text file in UTF-8, a line per word: the word, a tab, a number (more columns are passed over). null: the 7,517
    words of VADER (Hutto and Gilbert 2014), rated by ten people each from -4 to 4, which scripts/setup.sh fetches."""
    longest: Annotated[int, Field(ge=1, le=8)] = 4
    """Tokens of the longest words; longer ones are passed over, which is said."""
    rows: PositiveInt = 8192
    """Room for words in the model."""
    scale: PositiveFloat = 4.0
    """Multiplies the scores: with Adam, how much faster they are learnt than the rest of the model."""


class TextHeadConfig(Strict):
    """What all heads over whole texts have in common: a text's vector is made of its tokens' final ones."""

    num_classes: PositiveInt | None = None
    """Classes C; null: as many as the data has, and so it stands in a run's config.yaml."""
    token_dropout: Fraction = 0.0
    """Share of the tokens that training leaves out of a text, anew in each step."""
    pool: Pool = "mean"
    """How tokens' vectors become the text's: their mean, or their sum over the root of their number, with which many
    words that agree say more than one."""
    token_norm: bool = True
    """Tokens' vectors pass the model's last norm before that; false: their sizes say how much each token counts, as
    they always do with model.layers=0."""
    ngrams: NgramConfig | None = None
    """Vectors of runs of tokens, of the whole text as it stands; null: none."""
    naive_bayes: NaiveBayesConfig | None = None
    """A linear model of the whole text's words and runs, whose scores are added to the head's; null: none."""
    lexicon: LexiconConfig | None = None
    """What is known of words before any text is read: the sums of their ratings score, too; null: none."""


class LinearHeadConfig(TextHeadConfig):
    """One linear map from the text's vector to the classes."""

    kind: Literal["linear"] = "linear"
    """Kind of head."""


class ExpertHeadConfig(TextHeadConfig):
    """Experts from the text's vector to the classes: model.ffn says how many, how they are chosen and kept even.

    An expert is a network of linear maps with ReLU between; with model.layers=0 the vector is made of the tokens'
    embeddings.
    """

    kind: Literal["experts"] = "experts"
    """Kind of head."""
    hidden_dims: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (64, 32)
    """Hidden widths of one expert, in order."""


HeadConfig: TypeAlias = LinearHeadConfig | ExpertHeadConfig
