"""Turns what went wrong into OpenAI's error shape: one table from exception to status, type, code and field."""

import logging
from dataclasses import dataclass

from starlette.responses import JSONResponse

from loraplex_registry.errors import (
    CorruptBlob,
    InvalidAdapter,
    InvalidReference,
    NotFound,
    RegistryError,
    UnknownAdapter,
)
from loraplex_server.engine.errors import AdapterRefused, BrokenLogits, DeadlinePassed, InvalidRequest, Overloaded
from loraplex_server.loop import EngineStopped
from loraplex_server.openai import error_body

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1


class TooLarge(ValueError):
    """The request body is over the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body is larger than {limit_bytes:,} bytes, which is the limit")


@dataclass(frozen=True)
class Problem:
    """An answer that is not a success."""

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None

    @property
    def body(self) -> dict[str, object]:
        """The JSON body."""
        return error_body(self.message, self.kind, self.code, self.param)

    def response(self) -> JSONResponse:
        """The whole response; 429 and 503 say when to try again, 401 what to send."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def problem(error: Exception, param: str | None = None) -> Problem:
    """What to answer for an error; ``param`` is the field that named an adapter, where one did."""
    message = str(error)
    match error:
        case InvalidRequest():
            return Problem(400, "invalid_request_error", "invalid_value", message, error.field)
        case TooLarge():
            return Problem(413, "invalid_request_error", "too_large", message, "body")
        case InvalidReference():
            return Problem(400, "invalid_request_error", "invalid_reference", message, param)
        case UnknownAdapter() if param == "model":
            message = message.replace("adapter", "model", 1)
            return Problem(404, "invalid_request_error", "model_not_found", message, param)
        case NotFound():
            return Problem(404, "invalid_request_error", "adapter_not_found", message, param)
        case AdapterRefused() | InvalidAdapter() | CorruptBlob():
            return Problem(422, "invalid_request_error", "adapter_refused", f"the adapter is refused: {message}", param)
        case DeadlinePassed():
            return Problem(408, "timeout_error", "timeout", message)
        case BrokenLogits():
            return Problem(500, "server_error", "broken_logits", message)
        case Overloaded():
            return Problem(429, "rate_limit_error", "overloaded", message)
        case RegistryError():
            return Problem(503, "server_error", "registry_unavailable", message)
        case EngineStopped():
            return Problem(503, "server_error", "stopping", message)
        case OSError():  # a request meets the system only where its adapter is read: the disk is full, a file is gone
            log.error("an adapter could not be read", exc_info=error)
            return Problem(
                503, "server_error", "adapter_unavailable", f"the adapter could not be read: {message}", param
            )
    log.error("a request failed", exc_info=error)
    return Problem(500, "server_error", "internal_error", "the server failed on this request; its log says why")
