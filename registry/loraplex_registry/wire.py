"""The JSON of the registry's answers and errors: for the HTTP face, its client and the command line."""

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .base import BaseDescription
from .errors import InvalidRequest, NotFound, RegistryError, RemoteError
from .manifest import FileEntry

T = TypeVar("T")


@dataclass(frozen=True)
class Proposal:
    """The body of a push: the files by sha256, what the base looks like from outside, and a message."""

    files: tuple[FileEntry, ...]
    base: BaseDescription
    message: str = ""


@cache
def adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def dump(kind: object, value: object) -> Any:
    """A value of a type, as JSON-able data."""
    return adapter_of(kind).dump_python(value, mode="json")


def load(kind: type[T], data: object) -> T:
    """The value of a type. Raises InvalidRequest naming the first field that is wrong."""
    try:
        return adapter_of(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        raise InvalidRequest(f"{field or 'the body'}: {first['msg']}", field) from error


def dump_error(error: RegistryError, kind: str) -> dict[str, Any]:
    """OpenAI's error shape; `detail` holds what the error class was made with."""
    detail = vars(error)
    param = "ref" if isinstance(error, NotFound) else getattr(error, "param", None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code, "detail": detail}}


def load_error(body: object) -> RegistryError:
    """The error that `dump_error` wrote, in its own class; RemoteError for anything else."""
    try:
        told = body["error"]  # type: ignore[index]
        kind = {kind.code: kind for kind in _all(RegistryError)}.get(told["code"], RemoteError)
        return kind(**told["detail"]) if told.get("detail") else kind(told["message"])
    except (KeyError, TypeError):
        return RemoteError(f"the registry server's answer is not one of ours: {str(body)[:200]}")


def _all(kind: type[RegistryError]) -> list[type[RegistryError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _all(child))]
