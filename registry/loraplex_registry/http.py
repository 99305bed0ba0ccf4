"""The registry over HTTP: one small route per verb. Owns statuses, needed scopes, size limits; decides nothing else.

A push is a proposal (files by sha256, the base's description): what is missing is uploaded, then proposed again. The
server reads no path that a caller names; it checks the adapter against the description before a version is made.
"""

import re
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

from . import bodies, errors
from .auth import OPEN, Bearer, guard_routes, identity_of, registry_of, require
from .base import BaseDescription
from .card import CARD
from .drafts import OpenDraft
from .errors import RegistryError
from .garbage import Marks
from .hub_protocol import asked_range, hub_routes, refusal, speaks
from .hub_upload import upload_routes
from .limited import LimitedRegistry
from .manifest import FileEntry
from .openapi import document
from .pages import PAGE, Listing, Page
from .protections import Approval, Rule
from .rates import Buckets, Rate
from .reference import Reference, check_digest, check_name, parse_alias
from .registry import Registry, writing
from .signing import Signature
from .tokens import ADMIN, PROMOTE, PUSH, READ, Identity, NewToken, Token
from .trusted_bases import TrustedBases
from .uploads import Upload, forget, gather, received
from .version import Act, AliasMove, Collected, Deletion, Fault, Version
from .watchers import Watchers, watch
from .wire import Proposal, dump, dump_error, load

BODY_BYTES = 32 << 20  # a proposal carries the names and shapes of a base's tensors
SCOPES = {  # what a token needs for each route; one that is not here cannot be served
    "GET /health": OPEN,
    "GET /ready": OPEN,
    "GET /v1/adapters": READ,
    "GET /v1/adapters/{name:path}/versions": READ,
    "POST /v1/adapters/{name:path}/versions": PUSH,
    "POST /v1/adapters/{name:path}/publish": PUSH,
    "GET /v1/openapi.json": READ,
    "GET /v1/aliases": READ,
    "GET /v1/card": READ,
    "POST /v1/tag": PUSH,
    "POST /v1/unalias": PROMOTE,
    "POST /v1/adapters/{name:path}/discard": PUSH,
    "GET /v1/drafts": READ,
    "GET /v1/search": READ,
    "GET /v1/resolve": READ,
    "GET /v1/history": READ,
    "GET /v1/watch": READ,
    "GET /v1/audit": READ,  # of all names: admin
    "GET /v1/verify": ADMIN,
    "POST /v1/promote": PROMOTE,
    "POST /v1/rollback": PROMOTE,
    "POST /v1/delete": ADMIN,
    "POST /v1/restore": PUSH,
    "POST /v1/gc": ADMIN,
    "GET /v1/manifests/{digest}": READ,
    "GET /v1/blobs/{digest}": READ,
    "PUT /v1/blobs/{digest}": PUSH,
    "GET /v1/uploads/{digest}": PUSH,
    "GET /v1/signatures": READ,
    "POST /v1/signatures": PUSH,
    "GET /v1/protections": READ,
    "POST /v1/protect": ADMIN,
    "POST /v1/unprotect": ADMIN,
    "POST /v1/approve": PROMOTE,
    "GET /v1/approvals": READ,
    "GET /v1/whoami": READ,
    "GET /v1/tokens": ADMIN,
    "POST /v1/tokens": ADMIN,
    "POST /v1/tokens/revoke": ADMIN,
    "GET /api/whoami-v2": READ,
    "GET /api/models/{repo:repo}/revision/{revision:path}": READ,
    "GET /api/models/{repo:repo}/tree/{revision}": READ,
    "GET /api/models/{repo:repo}/tree/{revision}/{path:path}": READ,
    "POST /api/models/{repo:repo}/paths-info/{revision:path}": READ,
    "GET /api/models/{repo:repo}/commits/{revision:path}": READ,
    "GET /api/models/{repo:repo}/refs": READ,
    "GET /api/models/{repo:repo}": READ,
    "GET /{repo:repo}/resolve/{revision}/{path:path}": READ,
    "POST /api/repos/create": PUSH,
    "DELETE /api/repos/delete": PUSH,  # of one without versions
    "POST /api/validate-yaml": READ,
    "POST /api/models/{repo:repo}/preupload/{revision:path}": PUSH,
    "POST /api/models/{repo:repo}/commit/{revision:path}": PUSH,
    "POST /api/models/{repo:repo}/tag/{revision:path}": PUSH,  # a tag that is an alias: promote as well
    "DELETE /api/models/{repo:repo}/tag/{revision:path}": PROMOTE,
    "POST /api/models/{repo:repo}/branch/{revision:path}": PUSH,
    "DELETE /api/models/{repo:repo}/branch/{revision:path}": PUSH,
}
OPEN_PATHS = [key.removeprefix("GET ") for key, scope in SCOPES.items() if scope == OPEN]
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
    guard = {"tokens": registry.tokens, "static": tokens or {}, "buckets": Buckets(rate) if rate else None}
    guard |= {"open_paths": OPEN_PATHS, "refuse": error_response}
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
            Route("/v1/adapters/{name:path}/discard", discard, methods=["POST"]),
            Route("/v1/drafts", list_drafts),
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
            Route("/v1/signatures", list_signatures),
            Route("/v1/signatures", add_signature, methods=["POST"]),
            Route("/v1/protections", list_protections),
            Route("/v1/protect", protect, methods=["POST"]),
            Route("/v1/unprotect", unprotect, methods=["POST"]),
            Route("/v1/approve", approve, methods=["POST"]),
            Route("/v1/approvals", list_approvals),
            Route("/v1/whoami", whoami),
            Route("/v1/tokens", list_tokens),
            Route("/v1/tokens", create_token, methods=["POST"]),
            Route("/v1/tokens/revoke", revoke_token, methods=["POST"]),
            Route("/v1/uploads/{digest}", get_upload),
            *hub_routes(),
            *upload_routes(),
        ],
        middleware=[Middleware(Bearer, **guard)],
        exception_handlers={
            RegistryError: on_registry_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
        },
    )
    guard_routes(app.routes, SCOPES)
    app.state.registry, app.state.marks = registry, Marks(registry.manifest)
    app.state.bases = bases or TrustedBases()
    app.state.watchers = Watchers(registry.catalog)
    return app


def read_tokens(text: str) -> dict[str, str]:
    """Tokens one a line, each alone or after the name of who holds it: `ada 3f9c…`. `#` begins a comment line."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {words[-1]: " ".join(words[:-1]) or "http" for words in lines}


# --- reading: plain functions, which Starlette runs in worker threads ---


async def health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def ready(request: Request) -> Response:
    request.app.state.registry.aliases()
    return JSONResponse({"status": "ready"})


def openapi(_request: Request) -> Response:
    return JSONResponse(document(tuple(STATUSES.items()), version("loraplex")))


def list_adapters(request: Request) -> Response:
    return _paged(request, Listing, _registry(request).list_page)


def list_versions(request: Request) -> Response:
    name = request.path_params["name"]
    return _paged(request, Page[Version], lambda *page: _registry(request).versions_page(name, *page))


def list_drafts(request: Request) -> Response:
    name = request.query_params.get("name")
    return _paged(request, Page[OpenDraft], lambda *page: _registry(request).drafts.page(name, *page))


def list_aliases(request: Request) -> Response:
    return JSONResponse({"aliases": _registry(request).aliases()})


def search(request: Request) -> Response:
    query, sort = request.query_params.get("q", ""), request.query_params.get("sort", "-created")
    return _paged(request, Page[Version], lambda *page: _registry(request).search_page(query, sort, *page))


def audit(request: Request) -> Response:
    name = request.query_params.get("name")
    if not name:
        require(request, ADMIN)
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
    if not _may_use(request)(sha256):
        raise errors.UnknownDigest(digest)
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


def list_signatures(request: Request) -> Response:
    found = _registry(request).signatures.of(_query(request, "digest"))
    return JSONResponse({"data": dump(list[Signature], found)})


def list_protections(request: Request) -> Response:
    return JSONResponse({"data": dump(list[Rule], _registry(request).protections.list())})


def list_approvals(request: Request) -> Response:
    found = _registry(request).protections.approvals(_query(request, "ref"))
    return JSONResponse({"data": dump(list[Approval], found)})


def whoami(request: Request) -> Response:
    return JSONResponse(dump(Identity, identity_of(request)))


def list_tokens(request: Request) -> Response:
    return JSONResponse({"data": dump(list[Token], _registry(request).tokens.list())})


def get_upload(request: Request) -> Response:
    """Where an upload of the one who asks was cut off."""
    sha256 = check_digest(request.path_params["digest"]).removeprefix("sha256:")
    return JSONResponse({"received_bytes": received(_registry(request).store, sha256, _who(request))})


# --- writing ---


async def put_blob(request: Request) -> Response:
    sha256, registry = check_digest(request.path_params["digest"]).removeprefix("sha256:"), _registry(request)
    offset = request.headers.get("upload-offset", "0")
    if not re.fullmatch("[0-9]{1,15}", offset):
        raise errors.InvalidRequest(f"Upload-Offset is {offset!r}, expected a number of bytes", "Upload-Offset")
    begun = Upload, registry.store, sha256, registry.limits.max_bytes, _who(request), int(offset)
    with writing(registry.root), await run_sync(*begun) as upload:
        async for chunk in request.stream():
            await run_sync(upload.write, chunk)
        await run_sync(upload.finish)
    return Response(status_code=201)


async def push(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    proposal = load(Proposal, await _json(request))
    version = await run_sync(_publish, request, name, proposal)
    return JSONResponse(dump(Version, version), status_code=201 if version.pushed else 200)


def _publish(request: Request, name: str, proposal: Proposal) -> Version:
    registry = _registry(request)

    def fill(folder: Path) -> tuple[FileEntry, ...]:
        return gather(registry.store, proposal.files, folder, _may_use(request))

    version = registry.publish(name, fill, proposal.base, message=proposal.message, who=_who(request))
    forget(registry.store, proposal.files)
    return version


async def publish(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    body = bodies.PUBLISH.read(await _json(request))
    base = load(BaseDescription, body["base"]) if "base" in body else request.app.state.bases
    registry, message, who = _registry(request), body.get("message", ""), _who(request)
    version = await run_sync(lambda: registry.publish_draft(name, base=base, message=message, who=who))
    return JSONResponse(dump(Version, version), status_code=201 if version.pushed else 200)


def discard(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    _registry(request).discard_draft(name)
    return JSONResponse({"discarded": name})


async def promote(request: Request) -> Response:
    body = bodies.PROMOTE.read(await _json(request))
    registry, require = _registry(request), body.get("require", [])
    reason, who = body.get("reason", ""), _who(request)
    move = await run_sync(lambda: registry.promote(body["ref"], body["to"], reason, require=require, who=who))
    return JSONResponse(dump(AliasMove, move))


async def rollback(request: Request) -> Response:
    body = bodies.ROLLBACK.read(await _json(request))
    registry, (name, _) = _registry(request), parse_alias(body["ref"])
    if "to" in body:
        Reference.parse(f"{name}:{body['to']}")  # a number that no version has is told before SQLite sees it
    move = await run_sync(
        lambda: registry.rollback(body["ref"], body.get("to"), body.get("reason", ""), who=_who(request))
    )
    return JSONResponse(dump(AliasMove, move))


async def unalias(request: Request) -> Response:
    body, who = bodies.NAMED.read(await _json(request)), _who(request)
    registry, reason = _registry(request), body.get("reason", "")
    return JSONResponse(dump(AliasMove, await run_sync(lambda: registry.remove_alias(body["ref"], reason, who=who))))


async def tag(request: Request) -> Response:
    body = bodies.TAG.read(await _json(request))
    registry, add, remove = _registry(request), body.get("add", []), body.get("remove", [])
    version = await run_sync(lambda: registry.tag(body["ref"], add, remove, who=_who(request)))
    return JSONResponse(dump(Version, version))


async def delete(request: Request) -> Response:
    return await _deletion(request, _registry(request).delete)


async def restore(request: Request) -> Response:
    return await _deletion(request, _registry(request).restore)


async def _deletion(request: Request, act: Callable[..., Deletion]) -> Response:
    body, who = bodies.NAMED.read(await _json(request)), _who(request)
    note = await run_sync(lambda: act(body["ref"], body.get("reason", ""), who=who))
    return JSONResponse(dump(Deletion, note))


async def gc(request: Request) -> Response:
    options = bodies.GC.read(await _json(request))
    registry, who = _registry(request), _who(request)
    return JSONResponse(dump(Collected, await run_sync(lambda: registry.gc(**options, who=who))))


async def add_signature(request: Request) -> Response:
    body = bodies.SIGNATURE.read(await _json(request))
    signatures, who = _registry(request).signatures, _who(request)
    made = await run_sync(lambda: signatures.add(body["digest"], body["key"], body["signature"], who=who))
    return JSONResponse(dump(Signature, made))


async def protect(request: Request) -> Response:
    body = bodies.PROTECT.read(await _json(request))
    asks = [body.get(key, []) for key in ("require", "signed_by", "approvers")]
    protections, who, (name, alias) = _registry(request).protections, _who(request), parse_alias(body["ref"])
    return JSONResponse(dump(Rule, await run_sync(lambda: protections.protect(name, alias, *asks, who=who))))


async def unprotect(request: Request) -> Response:
    body = bodies.UNPROTECT.read(await _json(request))
    protections, who, (name, alias) = _registry(request).protections, _who(request), parse_alias(body["ref"])
    return JSONResponse(dump(Rule, await run_sync(lambda: protections.unprotect(name, alias, who=who))))


async def approve(request: Request) -> Response:
    body = bodies.APPROVE.read(await _json(request))
    protections, who = _registry(request).protections, _who(request)
    return JSONResponse(dump(Approval, await run_sync(lambda: protections.approve(body["ref"], body["for"], who=who))))


async def create_token(request: Request) -> Response:
    body = bodies.TOKEN.read(await _json(request))
    tokens, who = _registry(request).tokens, _who(request)
    made = await run_sync(lambda: tokens.create(**body, who=who))
    return JSONResponse(dump(NewToken, made), status_code=201, headers={"Cache-Control": "no-store"})


async def revoke_token(request: Request) -> Response:
    body = bodies.REVOKE.read(await _json(request))
    tokens, who = _registry(request).tokens, _who(request)
    return JSONResponse(dump(Token, await run_sync(lambda: tokens.revoke(body["id"], who=who))))


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
    kind = {403: "permission_error", 429: "rate_limit_error"}.get(status, kind)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    if isinstance(error, errors.RateLimited):
        headers = {"Retry-After": str(error.retry_after_seconds)}
    if speaks(path):
        return refusal(error, status, headers)
    return JSONResponse(dump_error(error, kind), status_code=status, headers=headers)


def _registry(request: Request) -> Registry | LimitedRegistry:
    return registry_of(request)


def _may_use(request: Request) -> Callable[[str], bool]:
    """Whether the one who asks may have, or build on, the blob with a sha256: it could be another name's."""
    registry = _registry(request)
    return registry.has_blob if isinstance(registry, LimitedRegistry) else lambda sha256: True


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
