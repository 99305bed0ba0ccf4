"""The HTTP surface in Python's terms: options to request, response to record or error. Sends nothing, never waits.

Both clients share all of it; what they add is the sending.
"""

import difflib
import email.utils
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from .errors import (
    AdapterNotFound,
    AdapterRefused,
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    BadRequest,
    RateLimited,
    ServerError,
    Unauthorized,
)
from .records import Chunk, Completion, Model, Usage
from .sse import EventDecoder

DIGEST_HEADER = "x-loraplex-adapter-digest"

_BY_CODE: dict[str, type[APIStatusError]] = {
    "adapter_not_found": AdapterNotFound,
    "model_not_found": AdapterNotFound,  # `model` may name an adapter too
    "adapter_refused": AdapterRefused,
}
_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Unauthorized,
    413: BadRequest,
    422: BadRequest,
    429: RateLimited,
}


class CompletionOptions(TypedDict, total=False):
    """The fields of a completion request beside its prompt. What is left out, or None, takes the server's default."""

    adapter: str | None  # a reference: "quotes-tagger", "quotes-tagger:3", "quotes-tagger@production", "…@sha256:…"
    model: str | None  # the base's id, or a reference
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    n: int | None
    best_of: int | None
    echo: bool | None
    logprobs: int | None
    logit_bias: Mapping[str, float] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    suffix: str | None
    user: str | None
    extra_body: Mapping[str, Any] | None  # further fields, sent as they are


@dataclass(frozen=True, slots=True)
class Call:
    """One request, before anybody sends it."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


MODELS = Call("GET", "/v1/models")
HEALTH = Call("GET", "/health")
READY = Call("GET", "/ready")


def completion_call(
    prompt: str, options: CompletionOptions, *, stream: bool = False, include_usage: bool = False
) -> Call:
    """The request for a completion. Raises TypeError for an option that does not exist, naming the nearest."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}; ask once for each prompt")
    known = CompletionOptions.__annotations__
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "fields not listed go into extra_body"
            raise TypeError(f"unknown option {name!r}; {hint}")
    body: dict[str, Any] = {"prompt": prompt}
    body |= {name: value for name, value in options.items() if value is not None and name != "extra_body"}
    body |= options.get("extra_body") or {}
    body["stream"] = stream
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    return Call("POST", "/v1/completions", body)


def read_completion(call: Call, headers: Mapping[str, str], body: bytes) -> Completion:
    """The answer to a `completion_call`. Raises APIResponseError."""
    digest = _adapter_digest(call, headers)
    with _expecting("a completion", body):
        document = json.loads(body)
        first = document["choices"][0]
        return Completion(
            id=document["id"],
            created=document["created"],
            model=document["model"],
            text=first["text"],
            finish_reason=first["finish_reason"],
            usage=_usage(document),
            adapter=document.get("adapter"),
            adapter_digest=digest,
            choices=tuple(document["choices"]),
        )


class ChunkReader:
    """Reads one streamed answer: bytes in, chunks out. Raises APIResponseError when it is no event stream."""

    def __init__(self, call: Call, headers: Mapping[str, str]) -> None:
        content_type = headers.get("content-type", "")
        if not content_type.startswith("text/event-stream"):
            raise APIResponseError(f"expected a text/event-stream, the server sent {content_type or 'no content type'}")
        self._adapter_digest = _adapter_digest(call, headers)
        self._events = EventDecoder()
        self._done = False

    def feed(self, piece: bytes) -> Iterator[Chunk]:
        """The chunks that `piece` completes. Raises APIStatusError for an error event, else APIResponseError."""
        with _expecting("an event of UTF-8 text", piece):
            events = self._events.feed(piece)
        for event in events:
            if event == "[DONE]":
                self._done = True
            else:
                yield self._chunk(event)

    def finish(self) -> None:
        """The bytes have ended. Raises APIConnectionError if the answer has not."""
        if not self._done:
            raise APIConnectionError("the stream ended before [DONE]: the answer is not whole")

    def _chunk(self, event: str) -> Chunk:
        with _expecting("a completion's event", event.encode()):
            document = json.loads(event)
            if document.get("error"):
                raise _error(document["error"], status=0)
            # The piece that carries the usage has no choices.
            choice = document["choices"][0] if document["choices"] else {"text": "", "index": 0, "finish_reason": None}
            return Chunk(
                text=choice["text"],
                index=choice["index"],
                finish_reason=choice.get("finish_reason"),
                usage=_usage(document),
                id=document["id"],
                adapter=document.get("adapter"),
                adapter_digest=self._adapter_digest,
            )


def read_models(body: bytes) -> list[Model]:
    """The answer to `MODELS`. Raises APIResponseError."""
    with _expecting("a list of models", body):
        return [
            Model(
                id=entry["id"],
                created=entry["created"],
                owned_by=entry["owned_by"],
                parent=entry.get("parent"),
                digest=entry.get("digest"),
                version=entry.get("version"),
                aliases=tuple(entry.get("aliases") or ()),
            )
            for entry in json.loads(body)["data"]
        ]


def status_error(status: int, headers: Mapping[str, str], body: bytes) -> APIStatusError:
    """The error that a response other than 2xx stands for, whether or not its body has OpenAI's shape."""
    retry_after = _retry_after_seconds(headers.get("retry-after", ""))
    try:
        error = json.loads(body)["error"]
        return _error({**error, "message": error["message"]}, status, retry_after)
    except (ValueError, KeyError, TypeError):  # not ours: a proxy's page, another program
        shown = _shown(body)
        return _error({"message": f"HTTP {status}{f': {shown}' if shown else ''}"}, status, retry_after)


def _error(error: Mapping[str, Any], status: int, retry_after: float | None = None) -> APIStatusError:
    by_status = _BY_STATUS.get(status, ServerError if status >= 500 or status == 0 else APIStatusError)
    kind = _BY_CODE.get(str(error.get("code")), by_status)
    return kind(
        str(error.get("message")),
        status=status,
        type=error.get("type"),
        param=error.get("param"),
        code=error.get("code"),
        retry_after=retry_after,
    )


def _retry_after_seconds(value: str) -> float | None:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3); None when absent or neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _adapter_digest(call: Call, headers: Mapping[str, str]) -> str | None:
    digest = headers.get(DIGEST_HEADER)
    asked = (call.body or {}).get("adapter")
    if asked is not None and not digest:  # a server that does not know the field would answer from its base, in silence
        raise APIResponseError(f"asked for adapter {asked!r}, and the answer does not say which adapter gave it")
    return digest


def _usage(document: Mapping[str, Any]) -> Usage | None:
    usage = document.get("usage")
    if not usage:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"], cached)


@contextmanager
def _expecting(what: str, body: bytes) -> Iterator[None]:
    """Turns a misfit between the answer and the protocol into APIResponseError."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, APIStatusError):  # the server's own error, some of which are ValueErrors too
            raise
        reason = f"{type(error).__name__}: {error}"
        raise APIResponseError(f"expected {what}, the server sent {_shown(body)!r} ({reason})") from error


def _shown(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= 200 else text[:200] + "…"
