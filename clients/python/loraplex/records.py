"""What a server answers, as frozen records. Knows no JSON and no HTTP: `protocol` fills them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0  # of the prompt's, found computed already


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `text` and `finish_reason` are those of the first choice; `choices` holds all, as they came."""

    id: str
    created: int  # seconds since 1970
    model: str
    text: str
    finish_reason: str | None  # "stop" | "length" | …
    usage: Usage | None
    adapter: str | None  # the version that answered, "quotes-tagger:1"; None for the base
    adapter_digest: str | None  # "sha256:…" of that version
    choices: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer: the text since the piece before it.

    `finish_reason` is set on a choice's last piece. With `include_usage`, one more piece follows that holds only the
    usage.
    """

    text: str
    index: int  # which of `n` choices
    finish_reason: str | None
    usage: Usage | None
    id: str
    adapter: str | None
    adapter_digest: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of /v1/models: the base (`parent` is None) or an adapter over it."""

    id: str
    created: int  # seconds since 1970
    owned_by: str
    parent: str | None  # the base an adapter belongs to
    digest: str | None
    version: int | None
    aliases: tuple[str, ...]
