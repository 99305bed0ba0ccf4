"""Assembles the server: base, engine, registry, metrics and routes. The only place where they all meet."""

import hashlib
import hmac
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_registry.patience import Patience
from loraplex_registry.remote import open_registry
from loraplex_server.adapters.disk import folders
from loraplex_server.config import ServerConfig
from loraplex_server.drain import Door, Entrance
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import Base, load_base
from loraplex_server.loop import EngineLoop
from loraplex_server.metrics import Metrics
from loraplex_server.problems import Problem
from loraplex_server.routes import ROUTES
from loraplex_server.service import Service

REGISTRY_WAIT_SECONDS = 5  # a completion that has to ask a registry which takes no more requests just now


def create_app(config: ServerConfig, base: Base | None = None) -> Starlette:
    """The application, with its base loaded (or handed over) and its engine ready to start.

    Raises:
        EngineError, RegistryError: the base or the registry cannot be opened.
    """
    registry = open_registry(config.registry, patience=Patience(REGISTRY_WAIT_SECONDS))
    base = base or load_base(
        config.base,
        config.revision,
        config.quantization,
        config.device,
        config.dtype,
        double_quantization=config.double_quantization,
    )
    metrics = Metrics(
        max_adapters=config.metrics_adapters,
        build={"base": base.id, "quantization": base.quantization, "device": base.device.type},
    )
    wake = threading.Event()
    fetch = folders(registry, base.description, config.signed_by)
    loop = EngineLoop(Engine(base, config.engine, fetch, metrics, wake.set), wake)
    service = Service(loop, registry, metrics, config.adapter_weights, config.request_timeout)
    door = Door()

    @asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        service.loop.start()
        service.watch.start()
        try:
            yield
        finally:
            service.watch.stop()
            service.loop.stop()

    app = Starlette(
        routes=ROUTES,
        lifespan=running,
        middleware=[
            *([Middleware(BearerKeys, keys=config.api_keys)] if config.api_keys else []),
            Middleware(Entrance, door=door),
        ],
        exception_handlers={HTTPException: _http_problem},
    )
    app.state.service, app.state.config, app.state.door = service, config, door
    return app


class BearerKeys:
    """Lets /v1/* through only with one of the keys; probes and metrics are open. Keys are compared by their hashes."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and not self._allowed(scope):
            message = "a valid key is needed: send the header 'Authorization: Bearer KEY'"
            refusal = Problem(401, "authentication_error", "invalid_api_key", message).response()
            return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        header = HttpRequest(scope).headers.get("authorization", "")
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(matches)


async def _http_problem(http: HttpRequest, error: Any) -> Response:
    """Starlette's own refusals (no such path, wrong method) in OpenAI's shape."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{http.method} {http.url.path}: {error.detail}"
    response = Problem(error.status_code, "invalid_request_error", code, message).response()
    response.headers.update(error.headers or {})
    return response
