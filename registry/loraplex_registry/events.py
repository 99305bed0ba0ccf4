"""Moves as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): written, and read.

An event `move` carries an AliasMove as JSON and the id of its row, which `Last-Event-ID` gives back after a cut; an id
alone says where the stream begins; a comment shows that the server is there. Knows no routes and no ledger.
"""

import json
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import httpx

from .errors import RemoteError
from .version import AliasMove
from .watch import Row
from .wire import dump, load, load_error

HEARTBEAT_SECONDS = 15.0  # under a proxy's usual idle limit of 60
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS  # after which a reader gives a connection up
CONNECT_SECONDS = 5.0
RETRY_MILLISECONDS = 1000  # what a browser waits before it asks again
LINE_BYTES = 1 << 20  # a move is under 64 KiB
HEARTBEAT = ":\n\n"


@dataclass
class Event:
    """One event as it came; without data where the stream only says its place."""

    id: str = ""
    kind: str = "message"
    data: str = ""


def write_start(after: int) -> str:
    return f"retry: {RETRY_MILLISECONDS}\nid: {after}\n\n"


def write_move(move: AliasMove) -> str:
    return f"event: move\nid: {move.id}\ndata: {json.dumps(dump(AliasMove, move))}\n\n"


def write_error(body: dict) -> str:
    return f"event: error\ndata: {json.dumps(body)}\n\n"


def read_events(chunks: Iterable[bytes]) -> Iterator[Event]:
    """The events of a stream; one that is cut off in the middle is none. Raises RemoteError for an endless line."""
    event = Event()
    for line in _lines(chunks):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if event != Event():
                yield event
            event = Event()
        elif field == "id":
            event.id = value
        elif field == "event":
            event.kind = value
        elif field == "data":
            event.data += value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LINE_BYTES:
            raise RemoteError(f"the registry's stream has a line of more than {LINE_BYTES:,} bytes")
        yield from (line.removesuffix(b"\r").decode(errors="replace") for line in lines)


class StreamSource:
    """A server's stream of moves, as a Watch reads it. `ask` is RemoteRegistry's way to an answer."""

    def __init__(self, ask: Callable[..., AbstractContextManager[httpx.Response]], ref: str | None) -> None:
        self._ask, self._ref = ask, ref
        self._socket: socket.socket | None = None

    def rows(self, after: int | None) -> Generator[Row]:
        """Raises RemoteError when what comes is not such a stream, and the error that the stream tells of."""
        params = {key: value for key, value in (("ref", self._ref), ("after", after)) if value is not None}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        with self._ask("GET", "/v1/watch", params=params, timeout=timeout) as response:
            kind = response.headers.get("content-type", "").partition(";")[0]
            if kind != "text/event-stream":
                raise RemoteError(f"the registry answered GET /v1/watch with '{kind}', expected text/event-stream")
            self._socket = response.extensions["network_stream"].get_extra_info("socket")
            for event in read_events(response.iter_bytes()):
                yield read_row(event)

    def wake(self) -> None:
        """End the connection: a read that waits for the next event sees its end at once."""
        if self._socket is not None:
            with suppress(OSError):  # it has ended already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS has nothing to say at a cut


def read_row(event: Event) -> Row:
    """Raises the error that an event tells of, RemoteError for one that cannot be read."""
    try:
        told = json.loads(event.data) if event.data else None
        if event.kind != "error":
            return int(event.id), load(AliasMove, told) if event.kind == "move" else None
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"the registry's stream cannot be read: {error}") from error
    raise load_error(told)
