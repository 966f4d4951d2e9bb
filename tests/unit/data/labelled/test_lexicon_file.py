"""Rated words from a file: what a tokenizer makes of them, and what is told of a file that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.classifier import LexiconConfig
from moe_train.config.schema import TokenizerConfig
from moe_train.data.labelled.lexicon import MOST_TOLD, open_lexicon, rated_words
from moe_train.data.labelled.sources.vader import lexicon_file
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError

TEXT = "a good film , a bad film , good and bad and so good , so bad , Good films"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(vocab_size=300, lowercase=True, prefix_space=True)
    return Tokenizer.train_bpe([TEXT] * 20, config)


def written(tmp_path: Path, content: str | bytes) -> LexiconConfig:
    (tmp_path / "words.tsv").write_bytes(content.encode() if isinstance(content, str) else content)
    return LexiconConfig(path=str(tmp_path / "words.tsv"))


def refusal(config: LexiconConfig, tokenizer: Tokenizer) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_lexicon(config, tokenizer)
    return [str(problem) for problem in caught.value.problems]


def test_a_word_is_the_tokens_that_it_has_in_a_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = open_lexicon(written(tmp_path, "good\t1.5\t0.3\t[1, 2]\r\n\nso bad\t-2\n"), tokenizer)
    in_text = tokenizer.encode("film good so bad")
    good, so_bad = tuple(tokenizer.encode("good")), tuple(tokenizer.encode("so bad"))
    assert found.ratings == {good: 1.5, so_bad: -2.0}
    assert tuple(in_text) == (*tokenizer.encode("film"), *good, *so_bad)
    assert found.account == "lexicon words.tsv: 2 words, 2 different runs of tokens"


def test_words_that_are_the_same_to_the_tokenizer_have_the_mean_rating(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = open_lexicon(written(tmp_path, "Good\t1\ngood\t2\n"), tokenizer)
    assert found.ratings == {tuple(tokenizer.encode("good")): 1.5}
    assert "2 words, 1 different runs" in found.account


def test_long_words_are_passed_over_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = open_lexicon(written(tmp_path, "good\t1\nxyzzyplugh\t2\n"), tokenizer)
    assert len(found.ratings) == 1
    assert found.account.endswith("; 1 words of more than 4 tokens are passed over")


def test_a_file_without_a_short_word_is_refused(tmp_path: Path) -> None:
    (problem,) = refusal(written(tmp_path, "good\t1\n"), Tokenizer.of_bytes())
    assert "model.classifier.lexicon.longest=4" in problem and "the shortest has 5" in problem


def test_more_words_than_there_is_room_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = written(tmp_path, "good\t1\nbad\t-1\n").model_copy(update={"rows": 1})
    (problem,) = refusal(config, tokenizer)
    assert problem == f"model.classifier.lexicon.rows=1: {config.path} has 2 words; set it to 2 or more"


def test_all_bad_lines_are_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = written(tmp_path, "good\t1\nbad\nfine\tvery\n\t2\nso\tnan\n")
    problems = refusal(config, tokenizer)
    assert [problem.partition(":")[0] for problem in problems] == [f"{config.path}, line {n}" for n in (2, 3, 4, 5)]
    assert problems[0].endswith("is no word with a rating behind a tab; write a word, a tab and a number on each line")


def test_a_whole_file_of_bad_lines_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    problems = refusal(written(tmp_path, "word\n" * 1000), tokenizer)
    assert len(problems) == MOST_TOLD + 1 and "has 992 more such lines" in problems[-1]


@pytest.mark.parametrize(
    ("content", "told"), [("\n \n", "holds no word"), (b"good\t1\ncaf\xe9\t2\n", "byte 10 is not UTF-8")]
)
def test_what_is_no_list_of_words(tokenizer: Tokenizer, tmp_path: Path, content: str | bytes, told: str) -> None:
    (problem,) = refusal(written(tmp_path, content), tokenizer)
    assert problem.startswith("model.classifier.lexicon.path=") and told in problem


def test_no_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (problem,) = refusal(LexiconConfig(path=str(tmp_path)), tokenizer)
    assert "cannot be read: Is a directory" in problem
    (problem,) = refusal(LexiconConfig(path=str(tmp_path / "none.tsv")), tokenizer)
    assert "cannot be read: No such file" in problem


def test_a_byte_order_mark_belongs_to_no_word(tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("\ufeffgood\t1\n")
    assert rated_words(path, "utf-8") == [("good", 1.0)]


def test_the_words_of_vader(tokenizer: Tokenizer) -> None:
    words = dict(rated_words(lexicon_file(), "latin-1"))
    assert len(words) == 7502 and words["superb"] == 3.1 and words["awful"] == -2.0
    assert min(words.values()) >= -4 and max(words.values()) <= 4
    found = open_lexicon(LexiconConfig(longest=8), tokenizer)
    assert found.ratings[tuple(tokenizer.encode("good"))] == words["good"] == 1.9


def test_without_the_words_of_vader_the_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not hold vader_sentiment_lexicon\.txt; .* scripts/fetch_vader\.py"):
        lexicon_file(tmp_path)
