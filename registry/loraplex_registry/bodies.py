"""The JSON bodies of requests: which fields each has, of what type. Read by the routes, told by the OpenAPI document.

Knows no HTTP. A body with an unknown field, or with one of another type, is refused by that field's name.
"""

from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidRequest

_SCHEMAS: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    list: {"type": "array", "items": {"type": "string"}},
    dict: {"type": "object"},
}


@dataclass(frozen=True)
class Body:
    """The fields that must be there, and those that may be; null stands for one that is not."""

    needed: dict[str, type] = field(default_factory=dict)
    allowed: dict[str, type] = field(default_factory=dict)

    def read(self, body: object) -> dict[str, Any]:
        """The fields: all that are needed, no unknown one, each of its type. Raises InvalidRequest."""
        if not isinstance(body, dict):
            raise InvalidRequest("the body is not an object")
        known = self.needed | self.allowed
        fields: dict[str, Any] = {
            key: value for key, value in body.items() if value is not None or key not in self.allowed
        }
        for key in [*self.needed, *fields]:
            if key not in known:
                raise InvalidRequest(f"unknown field '{key}', expected {', '.join(known)}", key)
            if type(fields.get(key)) is not known[key]:
                told = f"field '{key}' is {fields.get(key)!r}, expected {known[key].__name__}"
                raise InvalidRequest(told, key)
            for one in fields[key] if known[key] is list else ():
                if not isinstance(one, str):
                    raise InvalidRequest(f"field '{key}' holds {one!r}, expected strings", key)
        return fields

    def schema(self) -> dict[str, Any]:
        """The same as a JSON schema."""
        nullable = {key: {"anyOf": [_SCHEMAS[kind], {"type": "null"}]} for key, kind in self.allowed.items()}
        fields = {key: _SCHEMAS[kind] for key, kind in self.needed.items()} | nullable
        return {"type": "object", "properties": fields, "required": [*self.needed], "additionalProperties": False}


PUBLISH = Body(allowed={"base": dict, "message": str})
PROMOTE = Body({"ref": str, "to": str}, {"reason": str, "require": list})
ROLLBACK = Body({"ref": str}, {"to": int, "reason": str})
TAG = Body({"ref": str}, {"add": list, "remove": list})
NAMED = Body({"ref": str}, {"reason": str})  # unalias, delete, restore
GC = Body(allowed={"grace_seconds": int, "keep": int, "dry_run": bool})
SIGNATURE = Body({"digest": str, "key": str, "signature": str})
PROTECT = Body({"ref": str}, {"require": list, "signed_by": list, "approvers": list})
UNPROTECT = Body({"ref": str})
APPROVE = Body({"ref": str, "for": str})
TOKEN = Body({"name": str, "scopes": list}, {"prefix": str, "expires_seconds": int})
REVOKE = Body({"id": str})
