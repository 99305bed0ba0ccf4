"""The registry over HTTP: one small route per verb. Owns statuses, tokens and size limits; decides nothing else.

A push is a proposal (files by sha256, the base's description): what is missing is uploaded, then proposed again. The
server reads no path that a caller names; it checks the adapter against the description before a version is made.
"""

import hmac
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import errors
from .base import BaseDescription
from .bodies import GC, NAMED, PROMOTE, PUBLISH, ROLLBACK, TAG
from .card import CARD
from .errors import RegistryError
from .hub_protocol import asked_range, hub_routes, refusal, speaks
from .hub_upload import upload_routes
from .manifest import FileEntry
from .openapi import document
from .pages import PAGE, Listing, Page
from .reference import Reference, check_digest, check_name, parse_alias
from .registry import Registry, writing
from .trusted_bases import TrustedBases
from .uploads import Upload, forget, gather
from .version import Act, AliasMove, Collected, Deletion, Fault, Version
from .watchers import Watchers, watch
from .wire import Proposal, dump, dump_error, load

BODY_BYTES = 32 << 20  # a proposal carries the names and shapes of a base's tensors
OPEN_PATHS = ("/health", "/ready")
STATUSES: dict[type[RegistryError], int] = {
    errors.InvalidReference: 400,
    errors.InvalidRequest: 400,
    errors.InvalidQuery: 400,
    errors.InvalidManifest: 400,
    errors.Unauthorized: 401,
    errors.NotFound: 404,
    errors.MissingBlobs: 409,
    errors.NothingToRollBack: 409,
    errors.RequirementNotMet: 409,
    errors.VersionInUse: 409,
    errors.NotDeleted: 409,
    errors.NumberTaken: 409,
    errors.StaleParent: 412,
    errors.TooLarge: 413,
    errors.InvalidAdapter: 422,
    errors.BaseNotFound: 422,
    errors.NotOffered: 422,
    errors.CorruptBlob: 422,
    errors.TooManyWatchers: 503,
    errors.StoreUnavailable: 503,
}


def create_app(
    registry: Registry, tokens: dict[str, str] | None = None, bases: TrustedBases | None = None
) -> Starlette:
    """The application. `tokens` is token → who holds it; without any, everyone may do everything.

    `bases` are what uploads of the Hub's clients are checked against.
    """
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/v1/openapi.json", openapi),
            Route("/v1/adapters", list_adapters),
            Route("/v1/adapters/{name:path}/versions", list_versions),
            Route("/v1/adapters/{name:path}/versions", push, methods=["POST"]),
            Route("/v1/adapters/{name:path}/publish", publish, methods=["POST"]),
            Route("/v1/aliases", list_aliases),
            Route("/v1/search", search),
            Route("/v1/resolve", resolve),
            Route("/v1/history", history),
            Route("/v1/watch", watch),
            Route("/v1/audit", audit),
            Route("/v1/verify", verify),
            Route("/v1/promote", promote, methods=["POST"]),
            Route("/v1/rollback", rollback, methods=["POST"]),
            Route("/v1/card", get_card),
            Route("/v1/tag", tag, methods=["POST"]),
            Route("/v1/unalias", unalias, methods=["POST"]),
            Route("/v1/delete", delete, methods=["POST"]),
            Route("/v1/restore", restore, methods=["POST"]),
            Route("/v1/gc", gc, methods=["POST"]),
            Route("/v1/manifests/{digest}", get_manifest),
            Route("/v1/blobs/{digest}", get_blob),
            Route("/v1/blobs/{digest}", put_blob, methods=["PUT"]),
            *hub_routes(),
            *upload_routes(),
        ],
        middleware=[Middleware(Bearer, tokens=tokens or {})],
        exception_handlers={
            RegistryError: on_registry_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
        },
    )
    app.state.registry = registry
    app.state.bases = bases or TrustedBases()
    app.state.watchers = Watchers(registry.catalog)
    return app


def read_tokens(text: str) -> dict[str, str]:
    """Tokens one a line, each alone or after the name of who holds it: `ada 3f9c…`. `#` begins a comment line."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {words[-1]: " ".join(words[:-1]) or "http" for words in lines}


class Bearer:
    """Lets a request in when it carries a known token, and notes who holds it. Health and readiness stay open."""

    def __init__(self, app: ASGIApp, tokens: dict[str, str]) -> None:
        self.app, self.tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.tokens or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        scheme, _, given = Request(scope).headers.get("authorization", "").partition(" ")
        holders = [who for token, who in self.tokens.items() if hmac.compare_digest(token.encode(), given.encode())]
        if scheme.lower() != "bearer" or not holders:
            wanted = errors.Unauthorized("a bearer token that this registry knows is needed")
            await error_response(wanted, scope["path"])(scope, receive, send)
            return
        scope.setdefault("state", {})["who"] = holders[0]
        await self.app(scope, receive, send)


# --- reading: plain functions, which Starlette runs in worker threads ---


async def health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def ready(request: Request) -> Response:
    _registry(request).aliases()
    return JSONResponse({"status": "ready"})


def openapi(_request: Request) -> Response:
    return JSONResponse(document(tuple(STATUSES.items()), version("loraplex")))


def list_adapters(request: Request) -> Response:
    return _paged(request, Listing, _registry(request).list_page)


def list_versions(request: Request) -> Response:
    name = request.path_params["name"]
    return _paged(request, Page[Version], lambda *page: _registry(request).versions_page(name, *page))


def list_aliases(request: Request) -> Response:
    return JSONResponse({"aliases": _registry(request).aliases()})


def search(request: Request) -> Response:
    query, sort = request.query_params.get("q", ""), request.query_params.get("sort", "-created")
    return _paged(request, Page[Version], lambda *page: _registry(request).search_page(query, sort, *page))


def audit(request: Request) -> Response:
    name = request.query_params.get("name")
    return _paged(request, Page[Act], lambda *page: _registry(request).audit_page(name, *page))


def _paged(request: Request, kind: object, ask: Callable[[int, str | None], Page]) -> Response:
    """The page that the request's `limit` and `cursor` ask for, and where the one after it is (RFC 8288)."""
    page = ask(_limit(request, PAGE), request.query_params.get("cursor"))
    headers = {}
    if page.next:
        headers["Link"] = f'<{request.url.include_query_params(cursor=page.next)}>; rel="next"'
    return JSONResponse(dump(kind, page), headers=headers)


def resolve(request: Request) -> Response:
    return JSONResponse(dump(Version, _registry(request).resolve(_query(request, "ref"))))


def history(request: Request) -> Response:
    moves = _registry(request).history(*parse_alias(_query(request, "ref")))
    return JSONResponse({"data": dump(list[AliasMove], moves)})


def verify(request: Request) -> Response:
    return JSONResponse({"data": dump(list[Fault], _registry(request).verify(request.query_params.get("ref")))})


def get_manifest(request: Request) -> Response:
    manifest = _registry(request).manifest(request.path_params["digest"])
    return Response(manifest.canonical(), media_type="application/json", headers={"ETag": f'"{manifest.digest}"'})


def get_card(request: Request) -> Response:
    """The card as it was pushed, front matter and all."""
    registry = _registry(request)
    version = registry.resolve(_query(request, "ref"))
    card = registry.card(version.digest)
    if card is None:
        raise errors.UnknownFile(f"{version}/{CARD}")
    return Response(card, media_type="text/markdown", headers={"ETag": f'"{version.digest}"'})


def get_blob(request: Request) -> Response:
    """The file as it lies, or one range of it; the client proves it by its digest, which is its name."""
    digest, store = check_digest(request.path_params["digest"]), _registry(request).store
    sha256, etag = digest.removeprefix("sha256:"), f'"{digest}"'
    try:
        total_bytes = store.place.size(sha256)
    except FileNotFoundError:
        raise errors.UnknownDigest(digest) from None
    asked = None
    if request.headers.get("if-range", etag) == etag:
        asked = asked_range(request.headers.get("range", ""), total_bytes)
    start, stop = asked or (0, total_bytes)
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(stop - start)}
    if asked:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total_bytes}"
    status, media_type = 206 if asked else 200, "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(store.unproven(sha256, start, stop), status, headers, media_type)


# --- writing ---


async def put_blob(request: Request) -> Response:
    sha256, registry = check_digest(request.path_params["digest"]).removeprefix("sha256:"), _registry(request)
    with writing(registry.root), await run_sync(Upload, registry.store, sha256, registry.limits.max_bytes) as upload:
        async for chunk in request.stream():
            await run_sync(upload.write, chunk)
        await run_sync(upload.finish)
    return Response(status_code=201)


async def push(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    proposal = load(Proposal, await _json(request))
    version = await run_sync(_publish, _registry(request), name, proposal, _who(request))
    return JSONResponse(dump(Version, version), status_code=201 if version.pushed else 200)


def _publish(registry: Registry, name: str, proposal: Proposal, who: str) -> Version:
    def fill(folder: Path) -> tuple[FileEntry, ...]:
        return gather(registry.store, proposal.files, folder)

    version = registry.publish(name, fill, proposal.base, message=proposal.message, who=who)
    forget(registry.store, proposal.files)
    return version


async def publish(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    body = PUBLISH.read(await _json(request))
    base = load(BaseDescription, body["base"]) if "base" in body else request.app.state.bases
    registry, message, who = _registry(request), body.get("message", ""), _who(request)
    version = await run_sync(lambda: registry.publish_draft(name, base=base, message=message, who=who))
    return JSONResponse(dump(Version, version), status_code=201 if version.pushed else 200)


async def promote(request: Request) -> Response:
    body = PROMOTE.read(await _json(request))
    registry, require = _registry(request), body.get("require", [])
    reason, who = body.get("reason", ""), _who(request)
    move = await run_sync(lambda: registry.promote(body["ref"], body["to"], reason, require=require, who=who))
    return JSONResponse(dump(AliasMove, move))


async def rollback(request: Request) -> Response:
    body = ROLLBACK.read(await _json(request))
    registry, (name, _) = _registry(request), parse_alias(body["ref"])
    if "to" in body:
        Reference.parse(f"{name}:{body['to']}")  # a number that no version has is told before SQLite sees it
    move = await run_sync(
        lambda: registry.rollback(body["ref"], body.get("to"), body.get("reason", ""), who=_who(request))
    )
    return JSONResponse(dump(AliasMove, move))


async def unalias(request: Request) -> Response:
    body, who = NAMED.read(await _json(request)), _who(request)
    registry, reason = _registry(request), body.get("reason", "")
    return JSONResponse(dump(AliasMove, await run_sync(lambda: registry.remove_alias(body["ref"], reason, who=who))))


async def tag(request: Request) -> Response:
    body = TAG.read(await _json(request))
    registry, add, remove = _registry(request), body.get("add", []), body.get("remove", [])
    version = await run_sync(lambda: registry.tag(body["ref"], add, remove, who=_who(request)))
    return JSONResponse(dump(Version, version))


async def delete(request: Request) -> Response:
    return await _deletion(request, _registry(request).delete)


async def restore(request: Request) -> Response:
    return await _deletion(request, _registry(request).restore)


async def _deletion(request: Request, act: Callable[..., Deletion]) -> Response:
    body, who = NAMED.read(await _json(request)), _who(request)
    note = await run_sync(lambda: act(body["ref"], body.get("reason", ""), who=who))
    return JSONResponse(dump(Deletion, note))


async def gc(request: Request) -> Response:
    options = GC.read(await _json(request))
    registry, who = _registry(request), _who(request)
    return JSONResponse(dump(Collected, await run_sync(lambda: registry.gc(**options, who=who))))


# --- requests in, errors out ---


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
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    if speaks(path):
        return refusal(error, status, headers)
    return JSONResponse(dump_error(error, kind), status_code=status, headers=headers)


def _registry(request: Request) -> Registry:
    return request.app.state.registry


def _who(request: Request) -> str:
    return getattr(request.state, "who", "http")


def _limit(request: Request, default: int) -> int:
    given = request.query_params.get("limit", str(default))
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise errors.InvalidRequest(f"limit is {given!r}, expected a number", "limit")
    return int(given)


def _query(request: Request, key: str) -> str:
    value = request.query_params.get(key)
    if value is None:
        raise errors.InvalidRequest(f"the query parameter '{key}' is missing", key)
    return value


async def _json(request: Request) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise errors.TooLarge(f"the body is larger than {BODY_BYTES:,} bytes, which is the limit")
    try:
        return from_json(bytes(body))  # unlike json, it refuses half a surrogate pair, which no UTF-8 can carry
    except ValueError as error:
        raise errors.InvalidRequest(f"the body is not JSON: {error}") from error
