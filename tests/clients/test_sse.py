"""The event stream parser, cut at every byte."""

import pytest

from loraplex.sse import EventDecoder

STREAM = (
    ": keep-alive\n\n"
    'data: {"text": "héllo 🙂"}\n\n'
    "event: token\r\nid: 7\r\ndata:no space\r\n\r\n"
    "data: two\rdata:  lines\r\r"
    "data\n\n"
    "retry: 10\n\n"
    "data: a\u2028b\x85c\x0bd: e\n\n"
    "data: [DONE]\n\n"
).encode()
EVENTS = ['{"text": "héllo 🙂"}', "no space", "two\n lines", "", "a\u2028b\x85c\x0bd: e", "[DONE]"]


@pytest.mark.parametrize("step", [1, 2, 3, 7, len(STREAM)])
def test_pieces_of_any_length_give_the_same_events(step: int):
    decoder = EventDecoder()
    events = [event for at in range(0, len(STREAM), step) for event in decoder.feed(STREAM[at : at + step])]
    assert events == EVENTS


@pytest.mark.parametrize("cut", range(len(STREAM)))
def test_one_cut_anywhere_gives_the_same_events(cut: int):
    decoder = EventDecoder()
    assert decoder.feed(STREAM[:cut]) + decoder.feed(b"") + decoder.feed(STREAM[cut:]) == EVENTS


def test_an_event_without_its_empty_line_is_not_given():
    assert EventDecoder().feed(b"data: half\n") == []


def test_what_is_not_utf8_is_an_error():
    with pytest.raises(UnicodeDecodeError):
        EventDecoder().feed(b"data: \xff\n\n")
