"""What routes read of a request beside its path: a parameter, a page, a JSON body; and whose bytes may be used.

Knows no verbs.
"""

from collections.abc import Callable
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .auth import registry_of
from .errors import InvalidRequest, TooLarge
from .limited import LimitedRegistry
from .pages import PAGE, Page
from .wire import dump

BODY_BYTES = 32 << 20  # a proposal carries the names and shapes of a base's tensors


def query(request: Request, key: str) -> str:
    """A parameter that must be there. Raises InvalidRequest."""
    value = request.query_params.get(key)
    if value is None:
        raise InvalidRequest(f"the query parameter '{key}' is missing", key)
    return value


def paged(request: Request, kind: object, ask: Callable[[int, str | None], Page]) -> Response:
    """The page that the request's `limit` and `cursor` ask for, and where the one after it is (RFC 8288)."""
    page = ask(_limit(request), request.query_params.get("cursor"))
    headers = {}
    if page.next:
        headers["Link"] = f'<{request.url.include_query_params(cursor=page.next)}>; rel="next"'
    return JSONResponse(dump(kind, page), headers=headers)


def _limit(request: Request) -> int:
    given = request.query_params.get("limit", str(PAGE))
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise InvalidRequest(f"limit is {given!r}, expected a number", "limit")
    return int(given)


async def read_json(request: Request, most_bytes: int = BODY_BYTES) -> Any:
    """Raises InvalidRequest, TooLarge."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise TooLarge(f"the body is larger than {most_bytes:,} bytes, which is the limit")
    try:
        return from_json(bytes(body))  # unlike json, it refuses half a surrogate pair, which no UTF-8 can carry
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def may_use(request: Request) -> Callable[[str], bool]:
    """Whether the one who asks may have, or build on, the blob with a sha256: it could be another name's."""
    registry = registry_of(request)
    return registry.has_blob if isinstance(registry, LimitedRegistry) else lambda sha256: True
