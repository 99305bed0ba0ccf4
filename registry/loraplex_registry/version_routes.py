"""The routes of versions: what there is, what is told of one, and what is done to it. The registry does the work."""

from collections.abc import Callable

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import bodies, errors
from .auth import GuardedRoute, registry_of, require, who_of
from .card import CARD
from .pages import Listing, Page
from .request import paged, query, read_json
from .signing import Signature
from .tokens import ADMIN, PUSH, READ
from .version import Act, Collected, Deletion, Fault, Version
from .wire import dump


def list_adapters(request: Request) -> Response:
    return paged(request, Listing, registry_of(request).list_page)


def list_versions(request: Request) -> Response:
    name = request.path_params["name"]
    return paged(request, Page[Version], lambda *page: registry_of(request).versions_page(name, *page))


def search(request: Request) -> Response:
    terms, sort = request.query_params.get("q", ""), request.query_params.get("sort", "-created")
    return paged(request, Page[Version], lambda *page: registry_of(request).search_page(terms, sort, *page))


def resolve(request: Request) -> Response:
    return JSONResponse(dump(Version, registry_of(request).resolve(query(request, "ref"))))


def get_manifest(request: Request) -> Response:
    manifest = registry_of(request).manifest(request.path_params["digest"])
    return Response(manifest.canonical(), media_type="application/json", headers={"ETag": f'"{manifest.digest}"'})


def get_card(request: Request) -> Response:
    """The card as it was pushed, front matter and all."""
    registry = registry_of(request)
    version = registry.resolve(query(request, "ref"))
    card = registry.card(version.digest)
    if card is None:
        raise errors.UnknownFile(f"{version}/{CARD}")
    return Response(card, media_type="text/markdown", headers={"ETag": f'"{version.digest}"'})


async def tag(request: Request) -> Response:
    body = bodies.TAG.read(await read_json(request))
    registry, add, remove = registry_of(request), body.get("add", []), body.get("remove", [])
    version = await run_sync(lambda: registry.tag(body["ref"], add, remove, who=who_of(request)))
    return JSONResponse(dump(Version, version))


async def delete(request: Request) -> Response:
    return await _deletion(request, registry_of(request).delete)


async def restore(request: Request) -> Response:
    return await _deletion(request, registry_of(request).restore)


async def _deletion(request: Request, act: Callable[..., Deletion]) -> Response:
    body, who = bodies.NAMED.read(await read_json(request)), who_of(request)
    note = await run_sync(lambda: act(body["ref"], body.get("reason", ""), who=who))
    return JSONResponse(dump(Deletion, note))


def verify(request: Request) -> Response:
    return JSONResponse({"data": dump(list[Fault], registry_of(request).verify(request.query_params.get("ref")))})


def audit(request: Request) -> Response:
    name = request.query_params.get("name")
    if not name:
        require(request, ADMIN)
    return paged(request, Page[Act], lambda *page: registry_of(request).audit_page(name, *page))


async def gc(request: Request) -> Response:
    options = bodies.GC.read(await read_json(request))
    registry, who = registry_of(request), who_of(request)
    return JSONResponse(dump(Collected, await run_sync(lambda: registry.gc(**options, who=who))))


def list_signatures(request: Request) -> Response:
    found = registry_of(request).signatures.of(query(request, "digest"))
    return JSONResponse({"data": dump(list[Signature], found)})


async def add_signature(request: Request) -> Response:
    body = bodies.SIGNATURE.read(await read_json(request))
    signatures, who = registry_of(request).signatures, who_of(request)
    made = await run_sync(lambda: signatures.add(body["digest"], body["key"], body["signature"], who=who))
    return JSONResponse(dump(Signature, made))


VERSIONS = (
    GuardedRoute("GET", "/v1/adapters", list_adapters, READ),
    GuardedRoute("GET", "/v1/adapters/{name:path}/versions", list_versions, READ),
    GuardedRoute("GET", "/v1/search", search, READ),
    GuardedRoute("GET", "/v1/resolve", resolve, READ),
    GuardedRoute("GET", "/v1/manifests/{digest}", get_manifest, READ),
    GuardedRoute("GET", "/v1/card", get_card, READ),
    GuardedRoute("POST", "/v1/tag", tag, PUSH),
    GuardedRoute("POST", "/v1/delete", delete, ADMIN),
    GuardedRoute("POST", "/v1/restore", restore, PUSH),
    GuardedRoute("GET", "/v1/verify", verify, ADMIN),
    GuardedRoute("GET", "/v1/audit", audit, READ),  # of all names: admin
    GuardedRoute("POST", "/v1/gc", gc, ADMIN),
    GuardedRoute("GET", "/v1/signatures", list_signatures, READ),
    GuardedRoute("POST", "/v1/signatures", add_signature, PUSH),
)
