"""How a server ends: new work is turned away, what runs may finish, then the process goes.

Knows signals and who is inside; nothing of what anybody asks.
"""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import FrameType

import click
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_server.loop import EngineStopped
from loraplex_server.problems import problem

_UNWIND_SECONDS = 5  # for connections to take what was written, once nothing runs any more


@dataclass
class Door:
    """How many API requests are inside, and whether another may come in. The event loop's thread alone changes it."""

    inside: int = 0
    closed: bool = False


class Entrance:
    """Middleware of /v1/*: counts who is inside, and answers 503 once the door is closed. Probes come through."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        if self._door.closed:
            refusal = problem(EngineStopped("the server is stopping; ask another one, or this one a little later"))
            return await refusal.response()(scope, receive, send)
        self._door.inside += 1
        try:
            return await self._app(scope, receive, send)
        finally:
            self._door.inside -= 1


class DrainingServer(uvicorn.Server):
    """uvicorn, but SIGTERM and Ctrl-C close the door first; the listener stays open, so that probes and 503s get out.

    It ends when nobody is inside, or after ``drain_seconds``: then ``stop`` is called, which must answer who is left.
    A second signal ends the process where it stands.
    """

    def __init__(self, app: ASGIApp, door: Door, drain_seconds: float, stop: Callable[[], None]) -> None:
        settings = {"log_level": "warning", "server_header": False, "timeout_graceful_shutdown": _UNWIND_SECONDS}
        super().__init__(uvicorn.Config(app, **settings))
        self._door = door
        self._drain_seconds = drain_seconds
        self._stop = stop
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. uvicorn would raise it again at its end; here the exit code after a drain is 0."""
        if self._door.closed:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._door.closed = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to end."""
        if self._door.closed and not self.should_exit:
            await self._drain()
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        if self._until is None:
            self._until = monotonic() + self._drain_seconds
            click.echo(f"stopping: {self._door.inside} requests may finish within {self._drain_seconds:g} s")
        if self._door.inside and monotonic() < self._until:
            return
        if self._door.inside:
            click.echo(f"stopping: {self._door.inside} requests are cut off")
            await asyncio.to_thread(self._stop)
        self.should_exit = True
