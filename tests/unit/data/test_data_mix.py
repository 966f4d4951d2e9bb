from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.schema import DataConfig, MixPart
from moe_train.data.sources import Document, open_source
from moe_train.data.sources.mix import Mix, WeightedSource
from moe_train.errors import ConfigError, DataError


class Texts:
    """A source in memory."""

    def __init__(self, domain, texts):
        self.domain, self.texts = domain, texts

    def documents(self):
        return (Document(text, self.domain) for text in self.texts)

    def identity(self):
        return {"texts": self.texts}


def texts(domain, count, length=20):
    return Texts(domain, [f"{domain} {number:06d}".ljust(length) for number in range(count)])


def bytes_by_domain(mix):
    sizes = Counter()
    for document in mix.documents():
        sizes[document.domain] += len(document.text.encode())
    return sizes


@settings(deadline=None, max_examples=25)
@given(counts=st.tuples(*[st.integers(200, 1000)] * 3), weights=st.tuples(*[st.floats(0.5, 2.0)] * 3))
def test_shares_of_bytes_follow_the_weights(counts, weights):
    parts = {name: WeightedSource(texts(name, n), w) for name, n, w in zip("abc", counts, weights, strict=True)}
    sizes = bytes_by_domain(Mix(parts))
    total = sum(sizes.values())
    for name, weight in zip("abc", weights, strict=True):
        assert abs(sizes[name] - total * weight / sum(weights)) < 40
    # the scarcest part is used whole
    scarcest = min("abc", key=lambda name: counts["abc".index(name)] / weights["abc".index(name)])
    assert sizes[scarcest] == 20 * counts["abc".index(scarcest)]


def test_nothing_is_repeated_and_the_order_is_kept():
    mix = Mix({"a": WeightedSource(texts("a", 100), 1.0), "b": WeightedSource(texts("b", 400), 1.0)})
    first = [document.text for document in mix.documents()]
    assert first == sorted(set(first))
    assert first == [document.text for document in mix.documents()]


def test_a_kept_document_does_not_depend_on_its_place():
    forward = Mix({"a": WeightedSource(texts("a", 50), 1.0), "b": WeightedSource(texts("b", 400), 1.0)})
    backward = texts("b", 400)
    backward.texts.reverse()
    reversed_mix = Mix({"a": WeightedSource(texts("a", 50), 1.0), "b": WeightedSource(backward, 1.0)})
    assert {d.text for d in forward.documents()} == {d.text for d in reversed_mix.documents()}


def test_heldout_documents_do_not_come_from_the_thinned_part_alone(monkeypatch):
    # Were both choices made by one hash, nearly all held-out documents would be from the part that is cut most.
    from moe_train.data.progress import no_progress
    from moe_train.data.survey import survey

    mix = Mix({"a": WeightedSource(texts("a", 500), 1.0), "b": WeightedSource(texts("b", 5000), 1.0)})
    domains = [document.domain for document in mix.documents()]
    heldout = Counter(d for d, out in zip(domains, survey(mix, no_progress).heldout(0.1), strict=True) if out)
    assert 30 <= heldout["b"] <= 70


def test_mix_from_the_configuration(tmp_path):
    (tmp_path / "a.txt").write_text("first " * 10)
    (tmp_path / "b.txt").write_text("second " * 10)
    parts = {name: MixPart(source="text", path=str(tmp_path / f"{name}.txt")) for name in "ab"}
    source = open_source(DataConfig(source="mix", parts=parts))
    assert [document.domain for document in source.documents()] == ["a", "b"]
    assert list(source.identity()) == ["a", "b"]


def test_all_missing_parts_are_reported_together(tmp_path):
    parts = {name: MixPart(source="text", path=str(tmp_path / name)) for name in "ab"}
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source="mix", parts=parts)).identity()
    assert len(caught.value.problems) == 2


def test_a_mix_within_a_mix_is_refused():
    with pytest.raises(ConfigError, match=r"data\.parts\.inner\.source=mix"):
        open_source(DataConfig(source="mix", parts={"inner": MixPart(source="mix")}))


def test_an_empty_part_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"data\.parts\.a: has no documents"):
        list(open_source(DataConfig(source="mix", parts={"a": MixPart(source="text", path=str(tmp_path))})).documents())
