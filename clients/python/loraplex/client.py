"""The two clients: they send what `protocol` builds and hand back what it reads. They do not know what bodies mean."""

import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from types import TracebackType
from typing import Self, Unpack

import anyio
import httpx

from . import protocol
from .errors import APIConnectionError, APIResponseError, APIStatusError, APITimeoutError, LoraplexError
from .protocol import Call, CompletionOptions
from .records import Chunk, Completion, Model
from .retry import Retries
from .settings import DEFAULT_TIMEOUT_SECONDS, Settings


class Client:
    """Speaks to a loraplex server. May be shared by threads; close it, or use it in a `with`.

    `base_url` falls back to LORAPLEX_URL and then to http://127.0.0.1:8000, `api_key` to LORAPLEX_API_KEY. `timeout` is
    the longest silence in seconds, not the length of an answer. Up to `max_retries` times, a call is repeated that the
    server turned away (429, 503) or that reached nobody; never one whose answer has begun. `transport` is httpx's.

    Every method raises the errors of `loraplex.errors`; the constructor ValueError, naming the argument.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._settings = Settings.resolve(base_url, api_key, timeout, max_retries)
        self._http = httpx.Client(transport=transport, **self._settings.httpx_options())

    def __repr__(self) -> str:
        return f"Client({self._settings.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Completion:
        """The whole answer to one prompt, from `adapter`, or from the base when none is named."""
        call = protocol.completion_call(prompt, options)
        response = self._ask(call, self._settings.max_retries)
        return protocol.read_completion(call, response.headers, response.content)

    def stream(
        self, prompt: str, *, include_usage: bool = False, **options: Unpack[CompletionOptions]
    ) -> Generator[Chunk, None, None]:
        """The answer piece by piece. The request is sent when the first piece is asked for.

        Closing the generator closes the connection, and the server stops generating:
        `with contextlib.closing(client.stream(…)) as chunks`.
        """
        return self._stream(protocol.completion_call(prompt, options, stream=True, include_usage=include_usage))

    def models(self) -> list[Model]:
        """The base and the adapters that the server offers."""
        return protocol.read_models(self._ask(protocol.MODELS, self._settings.max_retries).content)

    def health(self) -> bool:
        """Whether the server's event loop turns. One attempt; raises APIConnectionError when nobody answers."""
        return self._probe(protocol.HEALTH)

    def ready(self) -> bool:
        """Whether the base is loaded and the registry seen. One attempt, as `health`; False at 503."""
        return self._probe(protocol.READY)

    def _probe(self, call: Call) -> bool:
        try:
            self._ask(call, max_retries=0)
        except APIStatusError as error:
            if error.status != 503:
                raise
            return False
        return True

    def _stream(self, call: Call) -> Generator[Chunk, None, None]:
        with closing(self._open(call, self._settings.max_retries)) as response, _translated(self._settings):
            reader = protocol.ChunkReader(call, response.headers)
            for piece in response.iter_bytes():
                yield from reader.feed(piece)
            reader.finish()

    def _ask(self, call: Call, max_retries: int) -> httpx.Response:
        with closing(self._open(call, max_retries)) as response, _translated(self._settings):
            response.read()
        return response

    def _open(self, call: Call, max_retries: int) -> httpx.Response:
        """A 2xx response with its body still unread; the caller closes it."""
        retries = Retries(max_retries)
        while True:
            try:
                with _translated(self._settings):
                    request = self._http.build_request(call.method, call.path, json=call.body)
                    response = self._http.send(request, stream=True)
                    if response.is_success:
                        return response
                    with closing(response):
                        raise protocol.status_error(response.status_code, response.headers, response.read())
            except LoraplexError as error:
                time.sleep(retries.wait_seconds(error))


class AsyncClient:
    """`Client` for asyncio and trio: the same arguments, methods and errors, awaited."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = Settings.resolve(base_url, api_key, timeout, max_retries)
        self._http = httpx.AsyncClient(transport=transport, **self._settings.httpx_options())

    def __repr__(self) -> str:
        return f"AsyncClient({self._settings.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Completion:
        """The whole answer to one prompt, from `adapter`, or from the base when none is named."""
        call = protocol.completion_call(prompt, options)
        response = await self._ask(call, self._settings.max_retries)
        return protocol.read_completion(call, response.headers, response.content)

    def stream(
        self, prompt: str, *, include_usage: bool = False, **options: Unpack[CompletionOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """The answer piece by piece, for `async for`. The request is sent when the first piece is asked for.

        Closing the generator closes the connection, and the server stops generating:
        `async with contextlib.aclosing(client.stream(…)) as chunks`.
        """
        return self._stream(protocol.completion_call(prompt, options, stream=True, include_usage=include_usage))

    async def models(self) -> list[Model]:
        """The base and the adapters that the server offers."""
        return protocol.read_models((await self._ask(protocol.MODELS, self._settings.max_retries)).content)

    async def health(self) -> bool:
        """Whether the server's event loop turns. One attempt; raises APIConnectionError when nobody answers."""
        return await self._probe(protocol.HEALTH)

    async def ready(self) -> bool:
        """Whether the base is loaded and the registry seen. One attempt, as `health`; False at 503."""
        return await self._probe(protocol.READY)

    async def _probe(self, call: Call) -> bool:
        try:
            await self._ask(call, max_retries=0)
        except APIStatusError as error:
            if error.status != 503:
                raise
            return False
        return True

    async def _stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        async with aclosing(await self._open(call, self._settings.max_retries)) as response:
            with _translated(self._settings):
                reader = protocol.ChunkReader(call, response.headers)
                async for piece in response.aiter_bytes():
                    for chunk in reader.feed(piece):
                        yield chunk
                reader.finish()

    async def _ask(self, call: Call, max_retries: int) -> httpx.Response:
        async with aclosing(await self._open(call, max_retries)) as response:
            with _translated(self._settings):
                await response.aread()
        return response

    async def _open(self, call: Call, max_retries: int) -> httpx.Response:
        """A 2xx response with its body still unread; the caller closes it."""
        retries = Retries(max_retries)
        while True:
            try:
                with _translated(self._settings):
                    request = self._http.build_request(call.method, call.path, json=call.body)
                    response = await self._http.send(request, stream=True)
                    if response.is_success:
                        return response
                    async with aclosing(response):
                        raise protocol.status_error(response.status_code, response.headers, await response.aread())
            except LoraplexError as error:
                await anyio.sleep(retries.wait_seconds(error))


@contextmanager
def _translated(settings: Settings) -> Iterator[None]:
    """Turns httpx's errors into ours; httpx's own stays the cause."""
    url = settings.base_url
    try:
        yield
    except httpx.ConnectError as error:
        raise APIConnectionError(f"cannot reach {url}: {error}") from error
    except httpx.ConnectTimeout as error:
        raise APITimeoutError(f"cannot reach {url}: no connection in time") from error
    except httpx.TimeoutException as error:
        raise APITimeoutError(f"no answer from {url} within {settings.timeout_seconds:g} s") from error
    except httpx.TransportError as error:
        raise APIConnectionError(f"the connection to {url} broke: {error or type(error).__name__}") from error
    except httpx.RequestError as error:
        raise APIResponseError(f"unreadable answer from {url}: {error}") from error
