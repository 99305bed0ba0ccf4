"""The routes of what becomes a version: files that are uploaded, proposals of them, and drafts.

A push is a proposal (files by sha256, the base's description): what is missing is uploaded, then proposed again. No
path that a caller names is read; the adapter is checked against the description before a version is made.
"""

import re
from pathlib import Path

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from . import bodies, errors
from .auth import GuardedRoute, registry_of, who_of
from .base import BaseDescription
from .drafts import OpenDraft
from .hub_protocol import asked_range
from .manifest import FileEntry
from .pages import Page
from .reference import check_digest, check_name
from .registry import writing
from .request import may_use, paged, read_json
from .tokens import PUSH, READ
from .uploads import Upload, forget, gather, received
from .version import Version
from .wire import Proposal, dump, load


async def push(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    proposal = load(Proposal, await read_json(request))
    version = await run_sync(_publish, request, name, proposal)
    return JSONResponse(dump(Version, version), status_code=201 if version.pushed else 200)


def _publish(request: Request, name: str, proposal: Proposal) -> Version:
    registry = registry_of(request)

    def fill(folder: Path) -> tuple[FileEntry, ...]:
        return gather(registry.store, proposal.files, folder, may_use(request))

    version = registry.publish(name, fill, proposal.base, message=proposal.message, who=who_of(request))
    forget(registry.store, proposal.files)
    return version


async def publish(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    body = bodies.PUBLISH.read(await read_json(request))
    base = load(BaseDescription, body["base"]) if "base" in body else request.app.state.bases
    registry, message, who = registry_of(request), body.get("message", ""), who_of(request)
    version = await run_sync(lambda: registry.publish_draft(name, base=base, message=message, who=who))
    return JSONResponse(dump(Version, version), status_code=201 if version.pushed else 200)


def discard(request: Request) -> Response:
    name = check_name(request.path_params["name"])
    registry_of(request).discard_draft(name)
    return JSONResponse({"discarded": name})


def list_drafts(request: Request) -> Response:
    name = request.query_params.get("name")
    return paged(request, Page[OpenDraft], lambda *page: registry_of(request).drafts.page(name, *page))


def get_upload(request: Request) -> Response:
    """Where an upload of the one who asks was cut off."""
    sha256 = check_digest(request.path_params["digest"]).removeprefix("sha256:")
    return JSONResponse({"received_bytes": received(registry_of(request).store, sha256, who_of(request))})


def get_blob(request: Request) -> Response:
    """The file as it lies, or one range of it; the client proves it by its digest, which is its name."""
    digest, store = check_digest(request.path_params["digest"]), registry_of(request).store
    sha256, etag = digest.removeprefix("sha256:"), f'"{digest}"'
    if not may_use(request)(sha256):
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


async def put_blob(request: Request) -> Response:
    sha256, registry = check_digest(request.path_params["digest"]).removeprefix("sha256:"), registry_of(request)
    offset = request.headers.get("upload-offset", "0")
    if not re.fullmatch("[0-9]{1,15}", offset):
        raise errors.InvalidRequest(f"Upload-Offset is {offset!r}, expected a number of bytes", "Upload-Offset")
    begun = Upload, registry.store, sha256, registry.limits.max_bytes, who_of(request), int(offset)
    with writing(registry.root), await run_sync(*begun) as upload:
        async for chunk in request.stream():
            await run_sync(upload.write, chunk)
        await run_sync(upload.finish)
    return Response(status_code=201)


PUSHES = (
    GuardedRoute("POST", "/v1/adapters/{name:path}/versions", push, PUSH),
    GuardedRoute("POST", "/v1/adapters/{name:path}/publish", publish, PUSH),
    GuardedRoute("POST", "/v1/adapters/{name:path}/discard", discard, PUSH),
    GuardedRoute("GET", "/v1/drafts", list_drafts, READ),
    GuardedRoute("GET", "/v1/uploads/{digest}", get_upload, PUSH),
    GuardedRoute("GET", "/v1/blobs/{digest}", get_blob, READ),
    GuardedRoute("PUT", "/v1/blobs/{digest}", put_blob, PUSH),
)
