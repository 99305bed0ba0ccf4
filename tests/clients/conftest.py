"""A server that speaks loraplex's protocol over real HTTP, and does what a test tells it to: no model behind it.

Knows the HTTP surface from its description, not from the client's code.
"""

import asyncio
import json
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from loraplex import AsyncClient, Client

DIGEST = "sha256:" + "ab" * 32
WORDS = ["courage", ", ", "life", "\n"]


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    at_seconds: float


@dataclass
class ProtocolServer:
    """Answers completions with WORDS; each entry of `script` answers one request in their place."""

    url: str = ""  # known once it runs
    seen: list[Seen] = field(default_factory=list)
    script: deque[Callable[[dict[str, Any]], Response]] = field(default_factory=deque)
    cancelled: threading.Event = field(default_factory=threading.Event)  # a client left a stream that went on

    # What a script may hold

    def error(self, status: int, code: str | None = None, *, param: str | None = None, **headers: str) -> Callable:
        error = {"message": f"told to say {status}", "type": "some_error", "param": param, "code": code}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return lambda body: JSONResponse({"error": error}, status, headers=named)

    def raw(self, content: str, status: int = 200, media_type: str = "text/html") -> Callable:
        return lambda body: Response(content, status, media_type=media_type)

    def pieces(self, *pieces: bytes | Exception) -> Callable:
        """An event stream in exactly these HTTP chunks; an exception breaks the connection there."""

        async def send() -> AsyncIterator[bytes]:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        return lambda body: event_stream(send(), adapter=body.get("adapter"))

    def hang(self, *first: bytes) -> Callable:
        """Sends these HTTP chunks and then nothing, until the client leaves."""

        async def send() -> AsyncIterator[bytes]:
            try:
                for piece in first:
                    yield piece
                await asyncio.sleep(30)
            finally:
                self.cancelled.set()

        return lambda body: event_stream(send(), adapter=body.get("adapter"))

    def endless(self) -> Callable:
        async def send() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield event("again ")
                    await asyncio.sleep(0.01)
            finally:
                self.cancelled.set()

        return lambda body: event_stream(send(), adapter=body.get("adapter"))

    # What it serves

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._probe),
            Route("/ready", self._probe),
        ]
        return Starlette(routes=routes)

    async def _scripted(self, request: Request) -> tuple[dict[str, Any], Response | None]:
        raw = await request.body()
        body = json.loads(raw) if raw else {}
        self.seen.append(Seen(request.url.path, body, dict(request.headers), time.monotonic()))
        return body, self.script.popleft()(body) if self.script else None

    async def _completions(self, request: Request) -> Response:
        body, told = await self._scripted(request)
        if told:
            return told
        adapter = body.get("adapter")
        if body.get("stream"):
            return event_stream(self._words(body), adapter)
        return JSONResponse(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1_700_000_000,
                "model": "tiny",
                "adapter": adapter and f"{adapter.partition('@')[0]}:1",
                "choices": [{"text": "".join(WORDS), "index": 0, "finish_reason": "stop", "logprobs": None}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            },
            headers={"X-Loraplex-Adapter-Digest": DIGEST} if adapter else {},
        )

    async def _words(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        adapter = body.get("adapter")
        for word in WORDS[:-1]:
            yield event(word, adapter=adapter)
        yield event(WORDS[-1], adapter=adapter, finish_reason="stop")
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            yield sse({"id": "cmpl-1", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def _models(self, request: Request) -> Response:
        _, told = await self._scripted(request)
        base = {"id": "org/tiny[4bit]", "object": "model", "created": 1, "owned_by": "loraplex", "parent": None}
        adapter = {
            "id": "quotes-tagger",
            "object": "model",
            "created": 2,
            "owned_by": "loraplex",
            "parent": "org/tiny[4bit]",
            "digest": DIGEST,
            "version": 3,
            "aliases": ["production", "canary"],
        }
        return told or JSONResponse({"object": "list", "data": [base, adapter]})

    async def _probe(self, request: Request) -> Response:
        _, told = await self._scripted(request)
        return told or PlainTextResponse("ok")


def sse(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def event(text: str, *, adapter: str | None = None, finish_reason: str | None = None) -> bytes:
    choice = {"text": text, "index": 0, "finish_reason": finish_reason, "logprobs": None}
    return sse({"id": "cmpl-1", "created": 1, "model": "tiny", "adapter": adapter, "choices": [choice], "usage": None})


def event_stream(pieces: AsyncIterator[bytes], adapter: str | None) -> StreamingResponse:
    headers = {"X-Loraplex-Adapter-Digest": DIGEST} if adapter else {}
    return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)


@pytest.fixture(scope="session")
def _running_server() -> Iterator[ProtocolServer]:
    served = ProtocolServer()
    with serving(served.app(), log_config=None, lifespan="off") as served.url:
        yield served


@pytest.fixture
def server(_running_server: ProtocolServer) -> ProtocolServer:
    _running_server.seen.clear()
    _running_server.script.clear()
    _running_server.cancelled.clear()
    return _running_server


@pytest.fixture
def nowhere() -> str:
    """The URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAPLEX_URL", "LORAPLEX_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


class Awaited:
    """An AsyncClient called like a Client, so that one test asks the same of both."""

    def __init__(self, runner: asyncio.Runner, client: AsyncClient) -> None:
        self._runner = runner
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        if name == "stream":
            return lambda *args, **options: self._iterate(method(*args, **options))
        return lambda *args, **options: self._runner.run(method(*args, **options))

    def _iterate(self, chunks: Any) -> Iterator[Any]:
        try:
            while (chunk := self._runner.run(anext(chunks, None))) is not None:
                yield chunk
        finally:
            self._runner.run(chunks.aclose())


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, server: ProtocolServer) -> Iterator[Callable[..., Any]]:
    """`connect(**settings)`: a client of `server`, once sync and once async."""
    opened: list[Any] = []
    with asyncio.Runner() as runner:

        def open_client(base_url: str = server.url, **settings: Any) -> Any:
            if request.param == "sync":
                opened.append(client := Client(base_url, **settings))
                return client
            opened.append(client := Awaited(runner, AsyncClient(base_url, **settings)))
            return client

        yield open_client
        for client in opened:
            client.close() if request.param == "sync" else client.aclose()
