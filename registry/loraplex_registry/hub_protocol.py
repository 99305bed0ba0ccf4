"""The Hugging Face Hub's HTTP protocol, its reading side, so that stock clients read this registry through HF_ENDPOINT.

Owns the Hub's shapes and how its words map to ours: a repository is an adapter name, a branch an alias, a tag a version
number, a commit the first 40 hex digits of a version's digest. Knows no tokens and keeps nothing between requests.
"""

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote

from anyio.to_thread import run_sync
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from .auth import GuardedRoute, identity_of, registry_of, who_of
from .drafts import Draft
from .errors import (
    InvalidReference,
    InvalidRequest,
    NotFound,
    NoVersion,
    RegistryError,
    TooLarge,
    Unauthorized,
    UnknownAdapter,
    UnknownAlias,
    UnknownDigest,
    UnknownFile,
)
from .limited import LimitedRegistry
from .manifest import FileEntry, Manifest
from .reference import Reference, check_name
from .registry import Registry
from .tokens import PUSH, READ
from .version import Version

MAIN = "main"  # the branch of those who name none: what the bare name stands for
REPO_COMMIT = "X-Repo-Commit"
FORM_BYTES = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")
NUMBER = re.compile(r"v?([1-9][0-9]{0,8})")
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_PATH = re.compile(r"/api/|/(?!v1/)[^/]+(?:/[^/]+)?/resolve/")


class RepoConvertor(Convertor[str]):
    """`name` or `namespace/name`, and no more: a file's path may hold words of the protocol too."""

    regex = "[^/]+(?:/[^/]+)?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def hub_routes() -> list[GuardedRoute]:
    """The routes, for an application whose state has the `registry`. Those with a fixed last word come first."""
    register_url_convertor("repo", RepoConvertor())
    return [
        GuardedRoute("GET", "/api/whoami-v2", whoami, READ),
        GuardedRoute("GET", "/api/models/{repo:repo}/revision/{revision:path}", info, READ),
        GuardedRoute("GET", "/api/models/{repo:repo}/tree/{revision}", tree, READ),
        GuardedRoute("GET", "/api/models/{repo:repo}/tree/{revision}/{path:path}", tree, READ),
        GuardedRoute("POST", "/api/models/{repo:repo}/paths-info/{revision:path}", paths_info, READ),
        GuardedRoute("GET", "/api/models/{repo:repo}/commits/{revision:path}", commits, READ),
        GuardedRoute("GET", "/api/models/{repo:repo}/refs", refs, READ),
        GuardedRoute("GET", "/api/models/{repo:repo}", info, READ),
        GuardedRoute("GET", "/{repo:repo}/resolve/{revision}/{path:path}", resolve, READ),
    ]


# --- the routes ---


def whoami(request: Request) -> Response:
    who = who_of(request)
    auth = {
        "type": "access_token",
        "accessToken": {"displayName": who, "role": "write" if identity_of(request).may(PUSH) else "read"},
    }
    return JSONResponse({"type": "user", "id": who, "name": who, "fullname": who, "orgs": [], "auth": auth})


def info(request: Request) -> Response:
    """A revision, or without one the repository, which is there although it may have no version yet.

    So is its `main`: a client that had nothing to send is told the draft's commit.
    """
    try:
        version, manifest = _find(request)
    except NoVersion:
        if request.path_params.get("revision", MAIN) != MAIN:
            raise
        draft = _draft(request)
        told = {"id": draft.name, "modelId": draft.name, "sha": draft.commit, "siblings": [], "tags": []}
        return JSONResponse(told | {"private": hasattr(request.state, "who")})
    created_at, base = _time(version.created_at), version.base.id
    return JSONResponse(
        {
            "id": version.name,
            "modelId": version.name,
            "author": version.name.rpartition("/")[0] or None,
            "sha": commit_of(version),
            "private": hasattr(request.state, "who"),  # it took a token to see it
            "gated": False,
            "disabled": False,
            "createdAt": created_at,
            "lastModified": created_at,
            "library_name": "peft",
            "tags": ["peft", "safetensors", "lora", f"base_model:{base}", f"base_model:adapter:{base}", *version.tags],
            "config": {"peft": {"base_model_name_or_path": base, "task_type": manifest.config.get("task_type")}},
            "siblings": [_sibling(entry, "blobs" in request.query_params) for entry in manifest.files],
        }
    )


def tree(request: Request) -> Response:
    """What is in a folder, or with `recursive` all below it. In one page: a version has at most 200 files."""
    folder = PurePosixPath(request.path_params.get("path", ""))
    try:
        version, manifest = _find(request)
        name, files = str(version), manifest.files
    except NoVersion:
        if request.path_params["revision"] != MAIN:
            raise
        draft = _draft(request)  # whoever uploads is told what is there already, so as to take it out
        name, files = draft.name, draft.files
    below = [one for one in _entries(files) if folder in PurePosixPath(one["path"]).parents]
    if not below and folder.parts:
        raise UnknownFile(f"{name}/{folder}")
    if request.query_params.get("recursive", "").lower() == "true":
        return JSONResponse(below)
    return JSONResponse([one for one in below if folder == PurePosixPath(one["path"]).parent])


async def paths_info(request: Request) -> Response:
    """Of the paths in a form's `paths`, those that exist."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_BYTES:
            raise TooLarge(f"the form is larger than {FORM_BYTES:,} bytes, which is the limit")
    paths = parse_qs(body.decode(errors="replace")).get("paths")
    if not paths:
        raise InvalidRequest("the form's field 'paths' is missing", "paths")
    _, manifest = await run_sync(_find, request)
    return JSONResponse([one for one in _entries(manifest.files) if one["path"] in paths])


def refs(request: Request) -> Response:
    """Aliases move, so they are branches; numbers do not, so they are tags."""
    registry, name = registry_of(request), request.path_params["repo"]
    try:
        main = find(registry, name, MAIN)
    except NoVersion:
        return JSONResponse({"branches": [], "tags": [], "converts": [], "pullRequests": []})
    versions = registry.versions(name)
    aliases = {alias: version for version in versions for alias in version.aliases} | {MAIN: main}
    found = {
        "branches": [_ref(alias, "heads", version) for alias, version in sorted(aliases.items())],
        "tags": [_ref(tag, "tags", version) for version in versions if (tag := f"v{version.number}") not in aliases],
        "converts": [],
    }
    return JSONResponse(found | ({"pullRequests": []} if "include_prs" in request.query_params else {}))


def commits(request: Request) -> Response:
    """The versions up to the revision's, newest first."""
    newest, _ = _find(request)
    versions = [one for one in registry_of(request).versions(newest.name) if one.number <= newest.number]
    return JSONResponse([_commit(version) for version in reversed(versions)])


def resolve(request: Request) -> Response:
    """A commit's file, proven while it is sent: stock clients compare sizes alone. Other revisions redirect to it."""
    path = request.path_params["path"]
    try:
        version, manifest = _find(request)
    except NoVersion as error:
        if request.path_params["revision"] != MAIN:
            raise
        # `push_to_hub` looks for a card to go on from, and takes only this word for its absence.
        raise UnknownFile(f"{request.path_params['repo']}/{path}") from error
    commit = commit_of(version)
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    if entry is None:
        return refusal(UnknownFile(f"{version}/{path}"), 404, {REPO_COMMIT: commit})
    if request.path_params["revision"] != commit:
        # Clients ask HEAD and then GET: both must be of one version, even where an alias moves in between.
        pinned = f"{request.scope.get('root_path', '')}/{version.name}/resolve/{commit}/{quote(path)}"
        return RedirectResponse(pinned, headers={REPO_COMMIT: commit})
    etag = f'"{entry.sha256}"'
    headers = {"ETag": etag, REPO_COMMIT: commit, "Accept-Ranges": "bytes"}
    asked = None
    if request.headers.get("if-range", etag) == etag:
        asked = asked_range(request.headers.get("range", ""), entry.bytes)
    start, stop = asked or (0, entry.bytes)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.bytes}"
    headers["Content-Length"] = str(stop - start)
    status, media_type = 206 if asked else 200, "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    pieces = window(registry_of(request).store.chunks(entry), start, stop)
    first = next(pieces, b"")  # a small file is proven here, while the answer can still be an error
    return StreamingResponse(chain([first], pieces), status_code=status, headers=headers, media_type=media_type)


# --- the Hub's words and ours ---


def commit_of(version: Version) -> str:
    """A version's commit id: 40 lowercase hex digits, as clients expect of a commit that never changes."""
    return version.digest.removeprefix("sha256:")[:40]


def find(registry: Registry | LimitedRegistry, name: str, revision: str) -> Version:
    """The version that a revision of a repository stands for now. Raises NoVersion where there are only uploads."""
    try:
        return _version_at(registry, name, revision)
    except UnknownAdapter:
        if registry.drafts.find(name):
            raise NoVersion(f"{name}@{revision}") from None
        raise


def _version_at(registry: Registry | LimitedRegistry, name: str, revision: str) -> Version:
    """As `find`, for a name that has versions.

    A commit, `main`, a number (`3`), an alias, or a number as a tag (`v3`), in this order: what never moves comes
    first, so that no alias takes the place of a commit that a client pinned. Raises the kind of NotFound that fits.
    """
    try:
        bare = Reference(check_name(name))
    except InvalidReference:
        raise UnknownAdapter(name) from None
    if COMMIT.fullmatch(revision):
        for version in registry.versions(name):
            if commit_of(version) == revision:
                return version
        raise UnknownDigest(f"{name}@{revision}")
    if revision == MAIN:
        return registry.resolve(bare)
    number = NUMBER.fullmatch(revision)
    if number and not revision.startswith("v"):
        return registry.resolve(Reference(name, version=int(number[1])))
    try:
        return registry.resolve(Reference.parse(f"{name}@{revision}"))
    except UnknownAlias:
        if not number:
            raise
        return registry.resolve(Reference(name, version=int(number[1])))
    except InvalidReference:
        registry.resolve(bare)  # an unknown name is told before a malformed revision
        raise UnknownAlias(f"{name}@{revision}") from None


def speaks(path: str) -> bool:
    """Whether a request's path is the Hub's, so that its errors are told in the Hub's shape."""
    return _PATH.match(path) is not None


def refusal(error: RegistryError, status: int, headers: dict[str, str] | None = None) -> Response:
    """An error in the Hub's shape: its client makes an exception of a kind of its own out of X-Error-Code."""
    told = {"X-Error-Message": " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()}
    if code := _error_code(error):
        told["X-Error-Code"] = code
    return JSONResponse({"error": str(error)}, status, {**told, **(headers or {})})


def _error_code(error: RegistryError) -> str | None:
    match error:
        case UnknownFile():
            return "EntryNotFound"
        case UnknownAdapter() | Unauthorized():  # the Hub does not tell what needs a token from what is not there
            return "RepoNotFound"
        case NotFound():
            return "RevisionNotFound"
    return None


# --- bytes ---


def asked_range(header: str, total_bytes: int) -> tuple[int, int] | None:
    """First byte and end of a `Range` header's single range; None for any other. Raises HTTPException (416)."""
    found = _RANGE.fullmatch(header)
    if not found or header == "bytes=-":
        return None
    if not found[1]:
        start, stop = max(total_bytes - int(found[2]), 0), total_bytes
    else:
        start, stop = int(found[1]), min(int(found[2]) + 1, total_bytes) if found[2] else total_bytes
    if start >= stop:
        raise HTTPException(416, "the range is outside the file", {"Content-Range": f"bytes */{total_bytes}"})
    return start, stop


def window(chunks: Iterator[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The bytes from start to stop. The last piece comes only when all chunks have, and so are proven."""
    held, at = b"", 0
    for chunk in chunks:
        piece = chunk[max(start - at, 0) : max(stop - at, 0)]
        at += len(chunk)
        if piece:
            if held:
                yield held
            held = piece
    if held:
        yield held


# --- the Hub's shapes ---


def _find(request: Request) -> tuple[Version, Manifest]:
    """What the request's revision stands for: resolved once, and then read by its digest."""
    registry = registry_of(request)
    version = find(registry, request.path_params["repo"], request.path_params.get("revision", MAIN))
    return version, registry.manifest(version.digest)


def _draft(request: Request) -> Draft:
    """What is uploaded to a name that has no version."""
    name = request.path_params["repo"]
    draft = registry_of(request).drafts.find(name)
    if draft is None:
        raise UnknownAdapter(name)
    return draft


def _entries(files: tuple[FileEntry, ...]) -> list[dict[str, Any]]:
    return [*_folders(files), *map(_file, files)]


def _file(entry: FileEntry) -> dict[str, Any]:
    pointer = _pointer(entry)
    lfs = {"oid": entry.sha256, "size": entry.bytes, "pointerSize": len(pointer)}
    return {"type": "file", "path": entry.path, "size": entry.bytes, "oid": _git_id("blob", pointer), "lfs": lfs}


def _sibling(entry: FileEntry, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": entry.path}
    pointer = _pointer(entry)
    lfs = {"sha256": entry.sha256, "size": entry.bytes, "pointerSize": len(pointer)}
    return {"rfilename": entry.path, "size": entry.bytes, "blobId": _git_id("blob", pointer), "lfs": lfs}


def _folders(files: tuple[FileEntry, ...]) -> list[dict[str, Any]]:
    """The folders of files; each is named by what it holds, as a git tree is."""
    held: dict[str, bytes] = {}
    for entry in files:
        for folder in PurePosixPath(entry.path).parents[:-1]:  # the last is the top
            held[str(folder)] = held.get(str(folder), b"") + f"{entry.sha256} {entry.path}\n".encode()
    return [
        {"type": "directory", "path": path, "size": 0, "oid": _git_id("tree", content)}
        for path, content in sorted(held.items())
    ]


def _pointer(entry: FileEntry) -> bytes:
    """What git keeps in a large file's place (github.com/git-lfs/git-lfs/blob/main/docs/spec.md).

    Every file is told as a large one: then its sha256, which the manifest has, is what `hf cache verify` compares.
    """
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.sha256}\nsize {entry.bytes}\n".encode()


def _git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content, usedforsecurity=False).hexdigest()


def _ref(name: str, kind: str, version: Version) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit_of(version)}


def _commit(version: Version) -> dict[str, Any]:
    title, _, message = version.message.partition("\n")
    return {
        "id": commit_of(version),
        "title": title or str(version),
        "message": message.strip(),
        "authors": [{"user": version.created_by}],
        "date": _time(version.created_at),
    }


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the one form that the client reads
