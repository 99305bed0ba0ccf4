"""The registry over HTTP, put together: routes by subject, who may ask, and errors as statuses.

Each route is small and decides nothing: the registry does. Knows what an error's status is.
"""

from importlib.metadata import version

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from . import errors
from .alias_routes import ALIASES
from .auth import OPEN, Bearer, GuardedRoute
from .errors import RegistryError
from .garbage import Marks
from .hub_protocol import hub_routes, refusal, speaks
from .hub_upload import upload_routes
from .openapi import document
from .push_routes import PUSHES
from .rates import Buckets, Rate
from .registry import Registry
from .token_routes import TOKENS
from .tokens import READ
from .trusted_bases import TrustedBases
from .version_routes import VERSIONS
from .watchers import Watchers
from .wire import dump_error

STATUSES: dict[type[RegistryError], int] = {
    errors.InvalidReference: 400,
    errors.InvalidRequest: 400,
    errors.InvalidQuery: 400,
    errors.InvalidManifest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.InvalidKey: 400,
    errors.NotFound: 404,
    errors.MissingBlobs: 409,
    errors.WrongOffset: 409,
    errors.NothingToRollBack: 409,
    errors.RequirementNotMet: 409,
    errors.NotSigned: 409,
    errors.NotProtected: 409,
    errors.NotApprovable: 409,
    errors.VersionInUse: 409,
    errors.NotDeleted: 409,
    errors.NumberTaken: 409,
    errors.StaleParent: 412,
    errors.TooLarge: 413,
    errors.RateLimited: 429,
    errors.InvalidAdapter: 422,
    errors.BaseNotFound: 422,
    errors.NotOffered: 422,
    errors.CorruptBlob: 422,
    errors.TooManyWatchers: 503,
    errors.SigningUnavailable: 503,
    errors.StoreUnavailable: 503,
}


# --- about the server itself ---


async def health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def ready(request: Request) -> Response:
    request.app.state.registry.aliases()
    return JSONResponse({"status": "ready"})


def openapi(_request: Request) -> Response:
    return JSONResponse(document(tuple(STATUSES.items()), version("loraplex")))


ROUTES = (
    GuardedRoute("GET", "/health", health, OPEN),
    GuardedRoute("GET", "/ready", ready, OPEN),
    GuardedRoute("GET", "/v1/openapi.json", openapi, READ),
    *VERSIONS,
    *ALIASES,
    *PUSHES,
    *TOKENS,
)


def create_app(
    registry: Registry,
    tokens: dict[str, str] | None = None,
    bases: TrustedBases | None = None,
    rate: Rate | None = None,
) -> Starlette:
    """The application. `tokens` is token → who holds it, who may do everything; the catalog may hold more.

    Without any, everyone may do everything. `bases` are what uploads of the Hub's clients are checked against, and
    `rate` is how often each of them may ask.
    """
    routes = [*ROUTES, *hub_routes(), *upload_routes()]
    guard = {"tokens": registry.tokens, "static": tokens or {}, "buckets": Buckets(rate) if rate else None}
    guard |= {"open_paths": [route.path for route in routes if route.needs == OPEN], "refuse": error_response}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Bearer, **guard)],
        exception_handlers={
            RegistryError: on_registry_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
        },
    )
    app.state.registry, app.state.marks = registry, Marks(registry.manifest)
    app.state.bases = bases or TrustedBases()
    app.state.watchers = Watchers(registry.catalog)
    return app


def read_tokens(text: str) -> dict[str, str]:
    """Tokens one a line, each alone or after the name of who holds it: `ada 3f9c…`. `#` begins a comment line."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {words[-1]: " ".join(words[:-1]) or "http" for words in lines}


# --- errors out ---


def on_registry_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    return error_response(error, request.url.path)


def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request"}
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette tells the methods of the first route with this path alone
        same = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in same for method in route.methods}))
    return JSONResponse({"error": body}, status_code=error.status_code, headers=headers)


def on_disconnect(_request: Request, _error: Exception) -> Response:
    """The client went away while it sent: that is no fault of the server's, and nobody reads this."""
    return Response(status_code=400)


def error_response(error: RegistryError, path: str) -> Response:
    """The error in the shape that clients of the path read."""
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"
    kind = {403: "permission_error", 429: "rate_limit_error"}.get(status, kind)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    if isinstance(error, errors.RateLimited):
        headers = {"Retry-After": str(error.retry_after_seconds)}
    if speaks(path):
        return refusal(error, status, headers)
    return JSONResponse(dump_error(error, kind), status_code=status, headers=headers)
