"""Server-sent events, as they arrive: from pieces of bytes to the data of whole events."""

from __future__ import annotations

import codecs
from collections.abc import Iterator


class EventReader:
    """Reads a stream of events by the HTML standard, section 9.2.6, however it is cut into pieces.

    Lines end in CR, LF or both; a line that begins with a colon is a comment; the ``data`` fields of an event are
    joined by newlines; an empty line ends it. Other fields (``event``, ``id``, ``retry``) are passed over: chat
    completions have none that matter. An event that the end of the stream cuts off is none.
    """

    def __init__(self) -> None:
        # The standard asks for both: one byte order mark may come first, and bytes that are no UTF-8 are replaced.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
        self._rest = ""
        self._skip_newline = False
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the data of each event that ends in this piece."""
        for line in self._lines(self._decode(piece)):
            if line:
                self._take(line)
            elif self._data:
                yield "\n".join(self._data)
                self._data = []

    def _lines(self, text: str) -> Iterator[str]:
        """Yield the lines that end in a piece of text; the rest waits for the next."""
        if self._skip_newline and text:
            text, self._skip_newline = text.removeprefix("\n"), False
        # A CR ends its line at once. Whether an LF belongs to it is seen with the next piece only.
        self._skip_newline = self._skip_newline or text.endswith("\r")
        *lines, self._rest = (self._rest + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from lines

    def _take(self, line: str) -> None:
        """Take a field; a comment is one with an empty name."""
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
