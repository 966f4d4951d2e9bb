import pytest

from moe_train.data.labelled.collect import collect, in_order
from moe_train.data.labelled.sources import Example
from moe_train.data.progress import no_progress
from moe_train.errors import DataError, Problem


class Made:
    """A source of given rows, with classes of its own or not, and with bad rows at its end."""

    def __init__(self, rows, own=None, bad=()):
        self.rows, self.own, self.bad = rows, own, bad

    def classes(self):
        return self.own

    def examples(self):
        for number, (text, label) in enumerate(self.rows):
            yield Example(text, label, f"row {number}")
        if self.bad:
            raise DataError(self.bad)

    def identity(self):
        return {}


def collected(rows, given=None, own=None):
    found = collect(Made(rows, own), given, no_progress)
    return found, dict(zip(found.texts, found.labels_N.tolist(), strict=True))


def problems_of(rows, given=None, own=None, bad=()):
    with pytest.raises(DataError) as caught:
        collect(Made(rows, own, bad), given, no_progress)
    return [str(problem) for problem in caught.value.problems]


ROWS = [("a", "pos"), ("b", "neg"), ("c", "pos"), ("d", "neg")]


def test_labels_become_numbers_in_alphabetical_order():
    found, labels = collected(ROWS)
    assert found.classes == ("neg", "pos")
    assert labels == {"a": 1, "b": 0, "c": 1, "d": 0}
    assert (found.examples, found.conflicts) == (4, 0)


def test_classes_of_source_or_task_have_their_own_order():
    assert collected(ROWS, own=("pos", "neg"))[1]["a"] == 0
    assert collected(ROWS, given=("pos", "neg"))[1]["a"] == 0
    assert collected(ROWS, given=("neg", "pos"), own=("pos", "neg"))[1]["a"] == 1


def test_numbers_stand_for_the_classes_that_the_task_names():
    rows = [("a", "1"), ("b", "0"), ("c", "neg")]
    assert collected(rows, given=("neg", "pos"))[1] == {"a": 1, "b": 0, "c": 0}


def test_whole_numbers_are_ordered_by_value():
    assert in_order({"10", "9", "-2", "x", "a", "-"}) == ("-2", "9", "10", "-", "a", "x")


def test_copies_become_one_with_the_class_of_most_and_in_a_tie_the_first():
    rows = [
        ("a", "pos"),
        ("a", "neg"),
        ("a", "pos"),
        ("b", "pos"),
        ("b", "neg"),
        ("c", "pos"),
        ("c", "pos"),
        ("", "neg"),
    ]
    for order in (rows, rows[::-1]):
        found, labels = collected(order)
        assert labels == {"a": 1, "b": 0, "c": 1}
        assert (found.examples, found.conflicts) == (7, 2)


def test_bad_rows_and_unknown_classes_are_told_together():
    bad = [Problem("row 9", None, "is broken", "mend it")]
    problems = problems_of([("a", "pos"), ("b", "meh"), ("c", "2"), ("d", "-1")], given=("neg", "pos"), bad=bad)
    remedy = "mend the row, or name all classes in task.classes"
    assert problems == [
        f"row 1: its class 'meh' is none of neg, pos; {remedy}",
        f"row 2: its class '2' is none of neg, pos; {remedy}",
        f"row 3: its class '-1' is none of neg, pos; {remedy}",
        "row 9: is broken; mend it",
    ]


def test_other_classes_than_those_of_the_source_are_refused_before_reading():
    (problem,) = problems_of([("a", "0")], given=("bad", "good"), own=("neg", "pos"))
    assert problem.startswith("task.classes=bad,good: the classes of the data are neg, pos")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the source has no texts"),
        ([("", "x")], "the source has no texts"),
        ([("a", "x"), ("b", "x"), ("c", "x")], "all 3 texts are of the class x"),
        ([("a", "0.1"), ("b", "0.2"), ("c", "0.3")], "data.label_field has 3 different values in 3 texts"),
    ],
)
def test_labels_that_are_no_classes(rows, message):
    (problem,) = problems_of(rows)
    assert message in problem
