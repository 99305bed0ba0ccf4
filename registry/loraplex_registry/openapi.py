"""The OpenAPI document of the /v1 routes, made of the types and grammars that the routes themselves read and write.

Says for each route what it takes, what it answers and which errors it may answer with. Serves nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from . import bodies, errors
from .bodies import Body
from .drafts import OpenDraft
from .errors import RegistryError
from .pages import PAGE, PAGE_LIMIT, Listing, Page
from .protections import Approval, Rule
from .reference import ALIAS_PATTERN, DIGEST_PATTERN, NAME_PATTERN, REFERENCE_PATTERN
from .signing import Signature
from .tokens import Identity, NewToken, Token
from .version import Act, AliasMove, Collected, Deletion, Fault, Version
from .wire import Proposal

Statuses = Mapping[type[RegistryError], int]
_TEMPLATE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Operation:
    """One method of one route. `answer` is a type, a JSON schema, or the media type of bytes."""

    summary: str
    answer: Any
    query: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()  # of the query's
    body: Body | type | str | None = None
    errors: tuple[type[RegistryError], ...] = ()
    status: tuple[int, ...] = (200,)


_PATTERNS = {"name": NAME_PATTERN, "digest": DIGEST_PATTERN}
_QUERY: dict[str, dict[str, Any]] = {
    "ref": {"type": "string", "pattern": REFERENCE_PATTERN},
    "alias": {"type": "string", "pattern": f"{NAME_PATTERN[:-1]}@{ALIAS_PATTERN[1:]}"},
    "name": {"type": "string", "pattern": NAME_PATTERN},
    "digest": {"type": "string", "pattern": DIGEST_PATTERN},
    "limit": {"type": "integer", "minimum": 1, "maximum": PAGE_LIMIT, "default": PAGE},
    "cursor": {"type": "string", "description": "`next` of the page before"},
    "q": {"type": "string", "description": "terms between spaces, as f1>=0.9 base:tiny tag:nlp"},
    "sort": {"type": "string", "default": "-created"},
    "after": {"type": "integer", "minimum": 0},
}
_PAGED = ("limit", "cursor")
_NAMES: tuple[type[RegistryError], ...] = (errors.InvalidReference, errors.NotFound)
_PUSHED: tuple[type[RegistryError], ...] = (
    errors.InvalidRequest,
    errors.InvalidAdapter,
    errors.MissingBlobs,
    errors.TooLarge,
    errors.NotFound,
)
_MOVED = (*_NAMES, errors.InvalidRequest, errors.RequirementNotMet, errors.TooLarge)
_GUARDED: tuple[type[RegistryError], ...] = (
    *_MOVED,
    errors.InvalidKey,
    errors.NotSigned,
    errors.NotProtected,
    errors.NotApprovable,
    errors.SigningUnavailable,
)
_ALIASES = {
    "type": "object",
    "properties": {
        "aliases": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": {"type": "integer"}},
        }
    },
    "required": ["aliases"],
}


_EVENTS = "text/event-stream"
_EVENT = {  # as a client reads one; those without data, which only say where the stream is, are none
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "of the move, to go on from with Last-Event-ID"},
        "event": {"enum": ["move", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": AliasMove},
    },
    "required": ["event", "data"],
}


def _data(kind: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"data": kind}, "required": ["data"]}


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/openapi.json"): Operation("This document.", {"type": "object"}),
    ("GET", "/v1/adapters"): Operation(
        "The newest version of each name, and where their aliases point.", Listing, _PAGED, errors=_NAMES
    ),
    ("GET", "/v1/adapters/{name}/versions"): Operation(
        "A name's versions, oldest first.", Page[Version], _PAGED, errors=_NAMES
    ),
    ("POST", "/v1/adapters/{name}/versions"): Operation(
        "Push: make a version of uploaded files. 200: it was there.",
        Version,
        body=Proposal,
        errors=_PUSHED,
        status=(200, 201),
    ),
    ("POST", "/v1/adapters/{name}/publish"): Operation(
        "Make a version of what Hub clients uploaded.",
        Version,
        body=bodies.PUBLISH,
        errors=_PUSHED,
        status=(200, 201),
    ),
    ("POST", "/v1/adapters/{name}/discard"): Operation(
        "Forget what was uploaded and not published.", {"type": "object"}, errors=(*_NAMES, errors.MissingBlobs)
    ),
    ("GET", "/v1/drafts"): Operation(
        "What Hub clients uploaded and nobody published, by name.",
        Page[OpenDraft],
        ("name", *_PAGED),
        errors=_NAMES,
    ),
    ("GET", "/v1/uploads/{digest}"): Operation(
        "Where an upload of yours was cut off.",
        {
            "type": "object",
            "properties": {"received_bytes": {"type": "integer"}},
            "required": ["received_bytes"],
        },
        errors=_NAMES,
    ),
    ("GET", "/v1/aliases"): Operation("Where every alias points.", _ALIASES),
    ("GET", "/v1/search"): Operation(
        "Versions for which every term holds.", Page[Version], ("q", "sort", *_PAGED), errors=(errors.InvalidQuery,)
    ),
    ("GET", "/v1/resolve"): Operation(
        "The version a reference stands for.", Version, ("ref",), ("ref",), errors=_NAMES
    ),
    ("GET", "/v1/history"): Operation(
        "An alias's moves, oldest first.", _data(list[AliasMove]), ("ref=alias",), ("ref",), errors=_NAMES
    ),
    ("GET", "/v1/watch"): Operation(
        "Moves as they are made: server-sent events, without an end.",
        _EVENTS,
        ("ref", "after"),
        errors=(*_NAMES, errors.TooManyWatchers),
    ),
    ("GET", "/v1/audit"): Operation("What was done, newest first.", Page[Act], ("name", *_PAGED), errors=_NAMES),
    ("GET", "/v1/verify"): Operation("Faults of one version, or of all.", _data(list[Fault]), ("ref",), errors=_NAMES),
    ("POST", "/v1/promote"): Operation("Point an alias at a version.", AliasMove, body=bodies.PROMOTE, errors=_MOVED),
    ("POST", "/v1/rollback"): Operation(
        "Point an alias back.", AliasMove, body=bodies.ROLLBACK, errors=(*_MOVED, errors.NothingToRollBack)
    ),
    ("GET", "/v1/card"): Operation(
        "A version's README.md.", "text/markdown", ("ref",), ("ref",), errors=(*_NAMES, errors.CorruptBlob)
    ),
    ("POST", "/v1/tag"): Operation("Put tags on a version, take others off.", Version, body=bodies.TAG, errors=_MOVED),
    ("POST", "/v1/unalias"): Operation("Remove an alias.", AliasMove, body=bodies.NAMED, errors=_MOVED),
    ("POST", "/v1/delete"): Operation("Hide a version.", Deletion, body=bodies.NAMED, errors=_MOVED),
    ("POST", "/v1/restore"): Operation("Show a deleted version again.", Deletion, body=bodies.NAMED, errors=_MOVED),
    ("POST", "/v1/gc"): Operation(
        "Remove the bytes that nothing holds.",
        Collected,
        body=bodies.GC,
        errors=(errors.InvalidRequest, errors.TooLarge, errors.CorruptBlob),
    ),
    ("GET", "/v1/signatures"): Operation(
        "Signatures of a version.", _data(list[Signature]), ("digest",), ("digest",), errors=_NAMES
    ),
    ("POST", "/v1/signatures"): Operation("Keep a signature.", Signature, body=bodies.SIGNATURE, errors=_GUARDED),
    ("GET", "/v1/protections"): Operation("The rules of aliases.", _data(list[Rule]), errors=_NAMES),
    ("POST", "/v1/protect"): Operation("Give an alias a rule.", Rule, body=bodies.PROTECT, errors=_GUARDED),
    ("POST", "/v1/unprotect"): Operation("Take an alias's rule away.", Rule, body=bodies.UNPROTECT, errors=_GUARDED),
    ("POST", "/v1/approve"): Operation("Say yes to a version.", Approval, body=bodies.APPROVE, errors=_GUARDED),
    ("GET", "/v1/approvals"): Operation(
        "Who said yes to a version, and for which alias.", _data(list[Approval]), ("ref",), ("ref",), errors=_NAMES
    ),
    ("GET", "/v1/whoami"): Operation("Who asks, and what they may.", Identity),
    ("GET", "/v1/tokens"): Operation("Tokens, without their secrets.", _data(list[Token])),
    ("POST", "/v1/tokens"): Operation(
        "Make a token; its secret is told once.", NewToken, body=bodies.TOKEN, errors=_GUARDED, status=(201,)
    ),
    ("POST", "/v1/tokens/revoke"): Operation("End a token.", Token, body=bodies.REVOKE, errors=_GUARDED),
    ("GET", "/v1/manifests/{digest}"): Operation(
        "A manifest, byte for byte what its digest is of.",
        {"type": "object"},
        errors=(*_NAMES, errors.CorruptBlob),
    ),
    ("GET", "/v1/blobs/{digest}"): Operation(
        "A file by its digest, or one range of it.", "application/octet-stream", errors=_NAMES, status=(200, 206)
    ),
    ("PUT", "/v1/blobs/{digest}"): Operation(
        "Upload a file, proven by its digest.",
        None,
        body="application/octet-stream",
        errors=(errors.InvalidReference, errors.TooLarge, errors.CorruptBlob, errors.MissingBlobs),
        status=(201,),
    ),
}


@cache
def document(statuses: tuple[tuple[type[RegistryError], int], ...], version: str) -> dict[str, Any]:
    """The whole document. `statuses` says which status an error has."""
    schemas: dict[str, Any] = {"Error": _error()}
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation, dict(statuses), schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loraplex registry", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
        "security": [{"bearer": []}, {}],  # a registry without tokens lets everybody in
    }


def _operation(path: str, told: Operation, statuses: Statuses, schemas: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": _PATTERNS[name]}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    for given in told.query:
        name, _, kind = given.partition("=")
        asked = {"name": name, "in": "query", "required": name in told.needed, "schema": _QUERY[kind or name]}
        parameters.append(asked)
    answers = {str(status): _answer(told.answer, schemas) for status in told.status}
    everywhere = (errors.InvalidRequest, errors.Unauthorized, errors.Forbidden, errors.RateLimited)
    raised = {*told.errors, *everywhere, errors.StoreUnavailable}
    for status in sorted({_status(kind, statuses) for kind in raised} | ({416} if 206 in told.status else set())):
        answers[str(status)] = _answer({"$ref": _TEMPLATE.format(model="Error")}, schemas, "Refused.")
    found: dict[str, Any] = {"summary": told.summary, "parameters": parameters, "responses": answers}
    if told.body is not None:
        found["requestBody"] = {"required": True, "content": _content(told.body, schemas, "validation")}
    return found


def _status(kind: type[RegistryError], statuses: Statuses) -> int:
    return next(status for known, status in statuses.items() if issubclass(kind, known))


def _answer(kind: Any, schemas: dict[str, Any], summary: str = "Done.") -> dict[str, Any]:
    return {"description": summary} if kind is None else {"description": summary, "content": _content(kind, schemas)}


def _content(kind: Any, schemas: dict[str, Any], mode: str = "serialization") -> dict[str, Any]:
    if kind == _EVENTS:
        return {kind: {"schema": _schema(_EVENT, schemas, mode)}}
    if isinstance(kind, str):
        return {kind: {"schema": {"type": "string", "format": "binary"}}}
    return {"application/json": {"schema": _schema(kind, schemas, mode)}}


def _schema(kind: Any, schemas: dict[str, Any], mode: str) -> Any:
    """A type as a JSON schema, its parts among the document's; in a schema, the types that it holds."""
    if isinstance(kind, Body):
        return kind.schema()
    if isinstance(kind, dict):
        return {key: _schema(value, schemas, mode) for key, value in kind.items()}
    if isinstance(kind, list | str | bool | int):
        return kind
    schema = TypeAdapter(kind).json_schema(mode=mode, ref_template=_TEMPLATE)  # type: ignore[arg-type]
    schemas.update(schema.pop("$defs", {}))
    return schema


def _error() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": {"type": "string"}}
    error = {"type": "object", "properties": fields, "required": [*fields]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
