"""The engine's thread, and the way from the event loop to it and back.

Owns the thread and who waits for which request; decides nothing about requests and knows no HTTP.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, TypeVar

from loraplex_server.engine.engine import Delta, Engine
from loraplex_server.engine.errors import DeadlinePassed
from loraplex_server.engine.request import FinishReason, Request

log = logging.getLogger(__name__)

T = TypeVar("T")
Deliver = Callable[[Delta | Exception], object]


class EngineStopped(RuntimeError):
    """The engine's thread is not running."""


class EngineLoop:
    """Runs an engine on a thread of its own; ``stream`` is called from the event loop.

    ``wake`` must be the event that the engine's loads set when they end.
    """

    def __init__(self, engine: Engine, wake: threading.Event) -> None:
        self.engine = engine
        self._wake = wake
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: dict[str, Deliver] = {}  # by request id; the engine's thread alone touches it
        self._stopping = False
        self._gate = threading.Lock()  # nothing is posted once it was stopped
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests still running are answered with EngineStopped."""
        self._close()
        self._wake.set()
        self._thread.join()

    async def stream(self, requests: Sequence[Request], deadline: float | None = None) -> AsyncGenerator[Delta]:
        """Queue requests together and yield their deltas as they come, until the last one ended.

        Closing the iterator aborts what is still running, and so does the ``deadline`` (seconds, monotonic), whether or
        not anybody reads on.

        Raises:
            DeadlinePassed: the deadline came before the last one ended.
            Exception: what the first of them failed with; the others are aborted.
        """
        inbox: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def abort() -> None:
            with suppress(EngineStopped):  # then nothing runs any more
                self._post(lambda: self._abort(requests))

        def expire(seconds: float) -> None:
            abort()
            inbox.put_nowait(DeadlinePassed(f"the request was not done within {seconds:g} s, its limit"))

        self._post(lambda: self._add(requests, lambda item: loop.call_soon_threadsafe(inbox.put_nowait, item)))
        timer = None
        if deadline is not None:
            seconds = deadline - requests[0].arrived_at
            timer = loop.call_later(max(0.0, deadline - monotonic()), expire, round(seconds, 3))
        left = len(requests)
        try:
            while left:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason is FinishReason.ERROR and item.request.error:
                    raise item.request.error
                left -= item.finished
                yield item
        finally:
            if timer:
                timer.cancel()
            if left:
                abort()

    def warm(self, key: str) -> None:
        """Begin to load an adapter that nobody asked for yet."""
        self._post(lambda: self.engine.residency.warm(key))

    def tell(self, act: Callable[[Engine], None]) -> None:
        """Have something done to the engine, on its thread between two steps; nothing if it does not run."""
        with suppress(EngineStopped):
            self._post(lambda: act(self.engine))

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """What a function of the engine gives, called on its thread between two steps.

        Raises:
            EngineStopped: it does not run.
            Exception: what the function raised.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        loop = answer.get_loop()

        def tell(set_answer: Callable[[Any], None], what: Any) -> None:
            loop.call_soon_threadsafe(lambda: None if answer.done() else set_answer(what))

        def call() -> None:
            try:
                if self._stopping:
                    raise EngineStopped("the server is stopping")
                tell(answer.set_result, question(self.engine))
            except Exception as error:
                tell(answer.set_exception, error)

        self._post(call)
        return await answer

    def _post(self, command: Callable[[], None]) -> None:
        with self._gate:
            if not self.alive:
                raise EngineStopped("the engine is not running")
            self._commands.put(command)
        self._wake.set()

    def _close(self) -> None:
        with self._gate:
            self._stopping = True

    def _add(self, requests: Sequence[Request], deliver: Deliver) -> None:
        if self._stopping:
            deliver(EngineStopped("the server is stopping"))
            return
        try:
            for request in requests:
                self.engine.add(request)
                self._waiting[request.id] = deliver
        except Exception as error:  # refused: nothing of the group may run
            self._abort(requests)
            deliver(error)

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._waiting.pop(request.id, None)
            self.engine.abort(request)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                self._obey()
                deltas = self.engine.step()
                self._deliver(deltas)
                if not deltas and not self.engine.scheduler.running:
                    self._wake.wait()
            self._fail_all(EngineStopped("the server is stopping"))
            self._obey()
        except BaseException as error:
            log.exception("the engine's thread ended")
            self._close()
            self._fail_all(EngineStopped(f"the engine ended: {error!r}"))
            self._obey()
            raise

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            deliver = self._waiting.get(delta.request.id)
            if delta.finished:
                self._waiting.pop(delta.request.id, None)
            if deliver:
                deliver(delta)

    def _fail_all(self, error: Exception) -> None:
        for deliver in set(self._waiting.values()):
            deliver(error)
        self._waiting.clear()
