"""The Hugging Face Hub's HTTP protocol, its writing side, so that stock clients upload to this registry.

A commit on `main` changes the name's draft; a tag makes a version of it. Owns the routes, the bodies they take, and
what a tag's word means. Reading is hub_protocol's; what a draft is, is the registry's.
"""

import hashlib
import re
from contextlib import ExitStack
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .auth import GuardedRoute, registry_of, require, who_of
from .commit_stream import Commit, CommitReader
from .drafts import Changes, Tree
from .errors import (
    CorruptBlob,
    InvalidReference,
    InvalidRequest,
    MissingBlobs,
    NotOffered,
    NotSigned,
    NumberTaken,
    RequirementNotMet,
    UnknownAdapter,
)
from .hub_protocol import COMMIT, MAIN, NUMBER, commit_of, find, refusal
from .limited import LimitedRegistry
from .manifest import FileEntry
from .reference import Reference, check_alias, check_name
from .registry import MESSAGE_CHARACTERS, Registry, writing
from .request import read_json
from .tokens import PROMOTE, PUSH, READ
from .trusted_bases import TrustedBases
from .version import Version

BODY_BYTES = 16 << 20
METADATA_CHARACTERS = 64 << 10


def upload_routes() -> list[GuardedRoute]:
    """The routes, for an application whose state has the `registry` and the `bases`, after those of hub_protocol."""
    return [
        GuardedRoute("POST", "/api/repos/create", create_repo, PUSH),
        GuardedRoute("DELETE", "/api/repos/delete", delete_repo, PUSH),  # of one without versions
        GuardedRoute("POST", "/api/validate-yaml", validate_yaml, READ),
        GuardedRoute("POST", "/api/models/{repo:repo}/preupload/{revision:path}", preupload, PUSH),
        GuardedRoute("POST", "/api/models/{repo:repo}/commit/{revision:path}", commit, PUSH),
        GuardedRoute("POST", "/api/models/{repo:repo}/tag/{revision:path}", tag, PUSH),  # of an alias: promote as well
        GuardedRoute("DELETE", "/api/models/{repo:repo}/tag/{revision:path}", delete_tag, PROMOTE),
        GuardedRoute("POST", "/api/models/{repo:repo}/branch/{revision:path}", branch, PUSH),
        GuardedRoute("DELETE", "/api/models/{repo:repo}/branch/{revision:path}", branch, PUSH),
    ]


# --- repositories ---


async def create_repo(request: Request) -> Response:
    """Begin a name with an empty draft. One that is there already answers 409 with its URL, as the Hub does."""
    body = await _body(request)
    name = _namespaced(_repo(body))
    wanted = body.get("visibility") or ("private" if body.get("private") else None)
    if wanted not in (None, "private", "public"):
        raise InvalidRequest(f"visibility is {wanted!r}, expected 'private' or 'public'", "visibility")
    if wanted == "private" and not hasattr(request.state, "who"):
        raise NotOffered("visibility is 'private', but this registry has no tokens: everyone who reaches it reads it")
    made = await run_sync(_create, registry_of(request), name, who_of(request))
    url = str(request.base_url) + name
    if not made:
        return JSONResponse({"error": f"You already created this model repo: {name}", "url": url}, 409)
    return JSONResponse({"url": url, "name": name, "id": name})


def _create(registry: Registry | LimitedRegistry, name: str, who: str) -> bool:
    try:
        registry.versions(name)
    except UnknownAdapter:
        with writing(registry.root):
            return registry.drafts.create(name, who)
    return False


async def delete_repo(request: Request) -> Response:
    """Only a name that has no version can go; versions are deleted one by one, and can be restored."""
    name = _repo(await _body(request))
    registry = registry_of(request)
    try:
        await run_sync(registry.versions, name)
    except UnknownAdapter:
        if await run_sync(registry.drafts.drop, name):
            return JSONResponse({})
        raise
    raise NotOffered(f"'{name}' has versions: each is deleted by itself, with registry delete {name}:N")


async def validate_yaml(request: Request) -> Response:
    """What is wrong with a card's metadata, which stands between two lines of `---`."""
    content = (await _body(request)).get("content")
    if not isinstance(content, str):
        raise InvalidRequest(f"content is {_short(content)}, expected a string", "content")
    told = await run_sync(_wrong_yaml, content)
    return JSONResponse({"errors": [{"message": told}] if told else [], "warnings": []}, 400 if told else 200)


def _wrong_yaml(content: str) -> str | None:
    import yaml  # huggingface_hub brings it along

    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", content, re.DOTALL | re.MULTILINE)
    if not found:
        return None
    if len(found[1]) > METADATA_CHARACTERS:
        return f"the metadata has more than {METADATA_CHARACTERS:,} characters, which is the limit"
    try:
        metadata = yaml.safe_load(found[1])  # the parser in C has no bound on depth, and would end the process
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return " ".join(str(error).split())
    return None if isinstance(metadata, dict | None) else f"the metadata is {_short(metadata)}, expected keys"


# --- commits ---


async def preupload(request: Request) -> Response:
    """Every file is to come inside the commit: then a stock client needs neither LFS nor Xet. Hidden ones are not.

    Nor does the client send a file that has the git id which is told here of what lies under its path already.
    """
    await run_sync(_writable, request)
    files = (await _body(request)).get("files")
    if not isinstance(files, list) or not all(
        isinstance(one, dict) and isinstance(one.get("path"), str) for one in files
    ):
        raise InvalidRequest(f"files is {_short(files)}, expected objects with a 'path'", "files")
    sizes = {one["path"]: one.get("size") for one in files}
    known = await run_sync(_known_ids, registry_of(request), request.path_params["repo"], sizes)
    told = []
    for path in sizes:
        if not (hidden := _is_hidden(path)):
            FileEntry(path, "0" * 64, 0)  # a path that no commit may hold is told before its bytes come
        there = {"oid": known[path]} if path in known else {}
        told.append({"path": path, "uploadMode": "regular", "shouldIgnore": hidden} | there)
    return JSONResponse({"files": told})


def _known_ids(registry: Registry | LimitedRegistry, name: str, sizes: dict[str, Any]) -> dict[str, str]:
    """The git ids of the name's own files, as a commit would find them, that have these paths and sizes.

    A client that is left with nothing to send names the commit that readers see. Where that is another than the
    draft's, who tags what was uploaded would tag the wrong one: so the smallest file is to come in any case.
    """
    draft, main = registry.drafts.find(name), published(registry, name)
    files = draft.files if draft else main.files
    same = sorted((entry for entry in files if entry.bytes == sizes.get(entry.path)), key=lambda entry: entry.bytes)
    spared = same[1:] if draft and main.commit else same
    return {entry.path: known for entry in spared if (known := _git_id(registry, entry))}


def _git_id(registry: Registry | LimitedRegistry, entry: FileEntry) -> str | None:
    """What git calls the content, a sha1 after a header; None of one that is damaged, which is to come again."""
    digest = hashlib.sha1(b"blob %d\0" % entry.bytes, usedforsecurity=False)
    try:
        for chunk in registry.store.chunks(entry):
            digest.update(chunk)
    except CorruptBlob:
        return None
    return digest.hexdigest()


async def commit(request: Request) -> Response:
    registry, name = registry_of(request), request.path_params["repo"]
    await run_sync(_writable, request)
    with writing(registry.root), ExitStack() as held:
        folder = await run_sync(held.enter_context, registry.store.stage())
        reader = CommitReader(folder, registry.limits.max_bytes)
        held.callback(reader.close)
        async for chunk in request.stream():
            await run_sync(reader.write, chunk)
        oid = await run_sync(_commit, registry, name, reader, who_of(request))
    url = f"{request.base_url}{name}/commit/{oid}"
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def _commit(registry: Registry | LimitedRegistry, name: str, reader: CommitReader, who: str) -> str:
    said = reader.finish()
    message = "\n".join(filter(None, [said.summary, said.description]))
    if len(message) > MESSAGE_CHARACTERS:
        told = f"the message has {len(message):,} characters, at most {MESSAGE_CHARACTERS:,} are kept"
        raise InvalidRequest(told, "summary")
    with registry.drafts.publishing() as keep:
        for entry in said.added.values():
            if (staged := reader.folder / entry.sha256).exists():  # two paths may have the same content
                registry.store.publish(staged, entry.sha256)
        changes = Changes(
            added=(*said.added.values(), *_copies(registry, name, said)),
            deleted=tuple(said.deleted),
            deleted_folders=tuple(said.deleted_folders),
            parent=said.parent,
            request=reader.digest.hexdigest(),
            who=who,
            message=message,
            max_bytes=registry.limits.max_bytes,
        )
        return keep(name, changes, lambda: published(registry, name))


def _copies(registry: Registry | LimitedRegistry, name: str, said: Commit) -> list[FileEntry]:
    """Files that a commit names by their sha256: only those that this repository has already."""
    if not said.copied:
        return []
    draft = registry.drafts.find(name)
    known = [*published(registry, name).files, *(draft.files if draft else ())]
    sizes = {entry.sha256: entry.bytes for entry in known}
    for path, sha256 in said.copied.items():
        if sha256 not in sizes:
            raise NotOffered(f"lfsFile {path!r}: {name} has no file with sha256 {sha256}; send it inside the commit")
    return [FileEntry(path, sha256, sizes[sha256]) for path, sha256 in said.copied.items()]


def published(registry: Registry | LimitedRegistry, name: str) -> Tree:
    """What `main` is when it is read: what a draft starts from."""
    try:
        version = registry.resolve(Reference(name))
    except UnknownAdapter:
        return Tree()
    return Tree(commit_of(version), registry.manifest(version.digest).files)


def _writable(request: Request) -> None:
    """Whether the request's revision takes commits. Raises NotFound, NotOffered."""
    registry, revision = registry_of(request), request.path_params["revision"]
    name = _namespaced(_known(registry, request.path_params["repo"]))
    if request.query_params.get("create_pr"):
        raise NotOffered("pull requests are not offered: commit to main, and tag what is to be a version")
    if revision != MAIN:
        version = find(registry, name, revision)
        raise NotOffered(f"'{revision}' is {version}, which never changes: commit to main")


def _known(registry: Registry | LimitedRegistry, name: str) -> str:
    """A name that has a draft or versions. Raises UnknownAdapter."""
    try:
        if registry.drafts.find(check_name(name)) is None:
            registry.versions(name)
    except InvalidReference:
        raise UnknownAdapter(name) from None
    return name


def _namespaced(name: str) -> str:
    """As it came. Stock clients stumble over the URL of a repository without a namespace, after the act is done."""
    if "/" not in name:
        raise NotOffered(f"'{name}' has no namespace in front, which a Hub client needs to upload, as in ns/{name}")
    return name


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in PurePosixPath(path).parts)


# --- tags ---


async def tag(request: Request) -> Response:
    body = await _body(request)
    word, message = body.get("tag"), body.get("message") or ""
    for key, value in (("tag", word), ("message", message)):
        if not isinstance(value, str):
            raise InvalidRequest(f"{key} is {_short(value)}, expected a string", key)
    if not NUMBER.fullmatch(str(word)):  # it moves an alias
        require(request, PROMOTE)
    registry, bases, name = registry_of(request), request.app.state.bases, request.path_params["repo"]
    revision = request.path_params["revision"]
    act = partial(tag_revision, registry, bases, name, revision, str(word), message, who_of(request))
    try:
        version = await run_sync(act)
    except (MissingBlobs, NotSigned, RequirementNotMet) as error:
        return refusal(error, 422)  # not 409, which a client that takes a tag as it is (`exist_ok`) passes over
    return JSONResponse({"tag": word, "version": str(version), "commitOid": commit_of(version)}, 201)


def tag_revision(
    registry: Registry | LimitedRegistry,
    bases: TrustedBases,
    name: str,
    revision: str,
    word: str,
    message: str,
    who: str,
) -> Version:
    """Tag a revision, first making a version of the draft where `main` has one.

    `v3` and `3` are the number of the version it is, or will be; any other word is an alias, which is pointed at it.
    Raises InvalidReference, NotFound, NumberTaken, and what Registry.publish_draft raises.
    """
    _known(registry, name)
    named = NUMBER.fullmatch(word)
    number = int(named[1]) if named else None
    if number is None and (word == MAIN or COMMIT.fullmatch(check_alias(word))):
        raise InvalidReference(f"'{word}' is no tag: it is read as a branch or a commit")
    draft = registry.drafts.find(name)
    if draft and revision in (MAIN, draft.commit):
        alias = word if number is None else None
        return registry.publish_draft(name, base=bases, message=message, number=number, alias=alias, who=who)
    version = find(registry, name, revision)
    if number is None:
        registry.promote(f"{version}", word, message, who=who)
    elif number != version.number:
        raise NumberTaken(f"'{revision}' is {version}, not {name}:{number}")
    return version


# --- what is refused ---


async def delete_tag(request: Request) -> Response:
    name, word = request.path_params["repo"], request.path_params["revision"]
    version = await run_sync(find, registry_of(request), name, word)
    raise NotOffered(
        f"the tag '{word}' of {version} stays: an alias moves, with a new tag or registry promote, and is kept"
    )


async def branch(request: Request) -> Response:
    """The only branch is `main`, which is there."""
    name = await run_sync(_known, registry_of(request), request.path_params["repo"])
    if request.method == "POST" and request.path_params["revision"] == MAIN:
        return JSONResponse({"error": f"{name} has its branch main already"}, 409)
    raise NotOffered("branches are not offered: commit to main, and tag what is to be a version")


# --- bodies ---


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest, TooLarge."""
    found = await read_json(request, BODY_BYTES)
    if not isinstance(found, dict):
        raise InvalidRequest(f"the body is {_short(found)}, expected an object")
    return found


def _repo(body: dict[str, Any]) -> str:
    """The name that a body's `organization` and `name` make. Raises InvalidRequest, InvalidReference."""
    name, organization, kind = body.get("name"), body.get("organization"), body.get("type") or "model"
    if kind != "model":
        raise InvalidRequest(f"type is {_short(kind)}, expected 'model': this registry keeps adapters", "type")
    if not isinstance(name, str):
        raise InvalidRequest(f"name is {_short(name)}, expected a string", "name")
    if not isinstance(organization, str | None):
        raise InvalidRequest(f"organization is {_short(organization)}, expected a string", "organization")
    return check_name(f"{organization}/{name}" if organization else name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
