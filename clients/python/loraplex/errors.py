"""What can go wrong between a program and a loraplex server. Knows the tree, not how a response is read.

LoraplexError
├── APIConnectionError (ConnectionError)    nobody answered, or the connection broke before the answer was whole
├── APITimeoutError (TimeoutError)          no byte came within the timeout
├── APIResponseError (ValueError)           an answer that is not loraplex's protocol
└── APIStatusError                          the server answered with an error; any status not listed below
    ├── BadRequest (ValueError)             400, 413, 422: a field is malformed or too large; `param` names it
    ├── Unauthorized (PermissionError)      401, 403: no bearer key, or a wrong one
    ├── AdapterNotFound (LookupError)       404 adapter_not_found, model_not_found: no such adapter, version or alias
    ├── AdapterRefused (ValueError)         422 adapter_refused: it does not fit the base, or its files are damaged
    ├── RateLimited                         429: too much is queued; `retry_after` says when to come back
    └── ServerError                         5xx, and errors that arrive inside a stream
"""


class LoraplexError(Exception):
    """Root of everything this package raises on its own account."""


class APIConnectionError(LoraplexError, ConnectionError):
    """Nobody answered, or the connection broke before the answer was whole."""


class APITimeoutError(LoraplexError, TimeoutError):
    """No byte came within the client's timeout."""


class APIResponseError(LoraplexError, ValueError):
    """The answer is not loraplex's protocol: another program listens there, or a proxy answered in its place."""


class APIStatusError(LoraplexError):
    """The server answered with an error.

    Attributes: `status` the HTTP status (0 for an error that arrived inside a stream), `message`, `type`, `param` and
    `code` of OpenAI's error object, `retry_after` the seconds that a Retry-After header asked for.
    """

    # Everything but the message has a default, so that pickle (multiprocessing) can rebuild an error from its args.
    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after


class BadRequest(APIStatusError, ValueError):
    """400, 413 or 422: a field of the request is malformed or too large; `param` names it."""


class Unauthorized(APIStatusError, PermissionError):
    """401 or 403: no bearer key, or a wrong one."""


class AdapterNotFound(APIStatusError, LookupError):
    """404: no such adapter, version or alias; the message names the nearest."""


class AdapterRefused(APIStatusError, ValueError):
    """422: the adapter exists and cannot be served: it does not fit the base, or its files are damaged."""


class RateLimited(APIStatusError):
    """429: too much is queued; `retry_after` says when to come back."""


class ServerError(APIStatusError):
    """5xx, or an error event inside a stream."""
