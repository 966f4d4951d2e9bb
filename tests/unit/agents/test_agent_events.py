"""Server-sent events, however the network cuts them, and the answers that are made of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.agents.agent import AgentError
from moe_train.agents.chat import StreamedAnswer, whole_answer
from moe_train.agents.events import EventReader

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=6)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def read(pieces: list[bytes]) -> list[str]:
    reader = EventReader()
    return [data for piece in pieces for data in reader.feed(piece)]


@st.composite
def cut(draw, whole: bytes) -> list[bytes]:
    """The same bytes in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]


@st.composite
def streams(draw) -> tuple[list[str], bytes]:
    """Events as lists of data lines, and one way to write them; comments and other fields between them."""
    wanted, written = [], "\ufeff" if draw(st.booleans()) else ""
    for lines in draw(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=4)):
        for line in lines:
            space = " " if line.startswith(" ") or draw(st.booleans()) else ""
            written += draw(st.sampled_from(["", ": comment", "event: x", "id: 1", "retry: 5", "unknown"]))
            written += draw(ENDS) if not written.endswith(("\n", "\r", "\ufeff")) and written else ""
            written += f"data:{space}{line}" + draw(ENDS)
        # A lone CR before a lone LF would be one end of a line, not two.
        written += "\r\n" if written.endswith("\r") else draw(ENDS)
        wanted.append("\n".join(lines))
    return wanted, written.encode()


@settings(max_examples=30, deadline=None)
@given(streams().flatmap(lambda found: st.tuples(st.just(found[0]), cut(found[1]))))
def test_events_do_not_depend_on_how_they_are_cut(case):
    wanted, pieces = case
    assert read(pieces) == wanted


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:  a\n\n", [" a"]),  # one space only is the field's
        (b"data\n\n", [""]),
        (b"data: a", []),  # cut off
        (b"data: a\n", []),
        (b": only a comment\n\n\n", []),
        (b"data: a\ndata: b\r\rdata: c\r\n\r\n", ["a\nb", "c"]),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b"datax: a\n\ndata : b\n\n", []),
    ],
)
def test_what_the_standard_says(written, wanted):
    assert read([written]) == read([bytes([byte]) for byte in written]) == wanted


def test_an_event_is_there_as_soon_as_its_empty_line():
    reader = EventReader()
    assert list(reader.feed(b"data: a\r\n\r")) == ["a"]
    assert list(reader.feed(b"\ndata: b\n")) == []
    assert list(reader.feed(b"\n")) == ["b"]


def streamed(*events: object) -> StreamedAnswer:
    answer = StreamedAnswer()
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        answer.feed(f"data: {data}\n\n".encode())
    return answer


def piece(text: str | None, finish: str | None = None) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


def test_an_answer_of_pieces():
    found = streamed(piece(""), piece("Hel"), piece("lo"), piece(None, "stop"), "[DONE]")
    assert found.is_complete and (found.answer().text, found.answer().finish) == ("Hello", "stop")


def test_a_server_that_ends_without_the_last_word_has_ended():
    assert streamed(piece("Hello", "length")).answer().finish == "length"


@pytest.mark.parametrize(
    ("events", "told", "is_passing"),
    [
        ([piece("Hel")], "broke off after 3 characters", True),
        ([piece("Hel"), {"error": {"message": "out of memory"}}], "out of memory", True),
        ([piece("Hel"), "<html>"], "not a JSON object: <html>", False),
        ([piece("  "), "[DONE]"], "empty", False),
        (["[DONE]"], "empty", False),
        (["[" * 100_000], "not a JSON object", False),
    ],
)
def test_broken_streams(events, told, is_passing):
    with pytest.raises(AgentError, match=told) as caught:
        streamed(*events).answer()
    assert caught.value.is_passing == is_passing


@pytest.mark.parametrize(
    "body",
    ["", "[]", "null", "{}", '{"choices": []}', '{"choices": [1]}', '{"choices": [{"message": {"content": null}}]}',
     '{"choices": [{"message": {"content": " \\n"}}]}', '{"choices": {"0": 1}}', b"\x00\xd8"],
    ids=str,
)  # fmt: skip
def test_what_is_no_answer(body):
    with pytest.raises(AgentError) as caught:
        whole_answer(body if isinstance(body, bytes) else body.encode())
    assert not caught.value.is_passing
