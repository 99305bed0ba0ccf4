"""The server's side of a watch: one look at the ledger for all who watch, and a stream of events for each.

Owns how many may watch, and their end when the server stops. Knows the ledger through LedgerReader alone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import uvicorn
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from . import events
from .auth import identity_of
from .catalog import Catalog
from .errors import InvalidRequest, RegistryError, TooManyWatchers
from .version import AliasMove
from .watch import POLL_SECONDS, LedgerReader
from .wire import dump_error

WATCHERS = 256
THREADS = 4  # of their own: pulls and verifications, which may hold all others, do not keep a move back
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would else keep events back


class Watchers:
    """All who watch one catalog. While there are any, a task looks at the ledger's end every POLL_SECONDS."""

    def __init__(self, catalog: Catalog, most: int = WATCHERS) -> None:
        self.catalog, self.most = catalog, most
        self.count, self.ended = 0, False
        self._threads = CapacityLimiter(THREADS)
        self._moved = asyncio.Event()  # a new one for every wake
        self._looking: asyncio.Task[None] | None = None

    @property
    def looking(self) -> bool:
        """Whether the ledger is looked at, which only those who watch are a reason for."""
        return self._looking is not None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """One more who watches. Raises TooManyWatchers."""
        if self.count >= self.most:
            raise TooManyWatchers(f"{self.most} clients watch already, which is the most at once")
        self.count += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            self.count -= 1
            if not self.count and self._looking:
                self._looking.cancel()
                self._looking = None

    def end(self) -> None:
        """End every stream: the server stops."""
        self.ended = True
        self._wake()

    async def stream(self, reader: LedgerReader, still_known: Callable[[], None]) -> AsyncIterator[str]:
        """The events for one who watches, until the server stops, the ledger cannot be read, or the token ends."""

        def read() -> list[AliasMove]:
            still_known()  # before the read: a move that comes after the token's end is not told
            return reader.read()

        yield events.write_start(reader.after)
        said_at = monotonic()
        while not self.ended:
            moved = self._moved  # before the read: a wake that comes after it is not missed
            try:
                moves = await run_sync(read, limiter=self._threads)
            except RegistryError as error:
                yield events.write_error(dump_error(error, "server_error"))
                return
            for move in moves:
                yield events.write_move(move)
            if moves:
                said_at = monotonic()
                continue
            # What wakes this may be of other names: then nothing is said, and that must not put the heartbeat off.
            try:
                await asyncio.wait_for(moved.wait(), max(said_at + events.HEARTBEAT_SECONDS - monotonic(), 0))
            except TimeoutError:
                yield events.HEARTBEAT
                said_at = monotonic()

    def _wake(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _look(self) -> None:
        seen = -1
        while True:
            try:
                last = await run_sync(self.catalog.last_move, limiter=self._threads)
            except RegistryError:
                last = -1  # those who are woken meet the same error, and tell it
                self._wake()
            if last > seen:
                self._wake()
            seen = last
            await asyncio.sleep(POLL_SECONDS)


class MoveStream(StreamingResponse):
    """A stream that counts as one who watches, from its first byte to its last or to the client's leaving."""

    media_type = "text/event-stream"

    def __init__(self, watchers: Watchers, reader: LedgerReader, still_known: Callable[[], None]) -> None:
        super().__init__(watchers.stream(reader, still_known), headers=HEADERS)
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._watchers.joined():
            await super().__call__(scope, receive, send)


async def watch(request: Request) -> Response:
    """`GET /v1/watch`: the route."""
    watchers: Watchers = request.app.state.watchers
    after = _after(request)
    prefix = identity_of(request).prefix
    reader = await run_sync(LedgerReader, watchers.catalog, request.query_params.get("ref"), after, prefix)
    if request.method == "HEAD":  # its body would be waited for without end
        return Response(media_type=MoveStream.media_type, headers=HEADERS)
    return MoveStream(watchers, reader, request.state.still_known)


def _after(request: Request) -> int | None:
    """What the client saw last. A client that comes back repeats its first question, so the header goes first."""
    for name, value in (
        ("Last-Event-ID", request.headers.get("last-event-id")),
        ("after", request.query_params.get("after")),
    ):
        if value is not None:
            if not (value.isascii() and value.isdigit() and len(value) <= 18):
                raise InvalidRequest(f"{name} is {value!r}, expected the id of a move", name)
            return int(value)
    return None


class StreamingServer(uvicorn.Server):
    """uvicorn, which waits for running requests before it stops, but not for those that watch: they are ended first."""

    async def shutdown(self, *args: object, **options: object) -> None:
        self.config.app.state.watchers.end()  # type: ignore[union-attr]
        await super().shutdown(*args, **options)  # type: ignore[arg-type]
