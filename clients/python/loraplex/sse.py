"""Server-sent events: bytes in, the data of each event out. Knows neither HTTP nor what the data means.

Source: the event stream format of the HTML standard, https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re

# Only these end a line. str.splitlines would also cut at U+2028 and others, which JSON may hold unescaped.
_LINE_END = re.compile(rb"\r\n|\r|\n")


class EventDecoder:
    """Takes a stream's bytes in pieces cut anywhere, also inside a character or a line end."""

    def __init__(self) -> None:
        self._partial_line = b""
        self._after_cr = False
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of each event that `piece` completes. Comments (keep-alives) and other fields are dropped.

        Raises UnicodeDecodeError for an event that is not UTF-8.
        """
        if not piece:
            return []
        if self._after_cr and piece.startswith(b"\n"):  # the other half of a \r\n
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r")
        *lines, self._partial_line = _LINE_END.split(self._partial_line + piece)

        events = []
        for line in lines:
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line and self._data:  # an empty line ends the event
                events.append(b"\n".join(self._data).decode())
                self._data = []
        return events
