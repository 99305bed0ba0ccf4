"""Long answers in pages: a Page, the cursor that asks for the one after it, and how to read all of them.

A cursor says after which row the next page begins, so that rows which come or go meanwhile move nothing: none is told
twice, and none that stays is left out. Knows no tables and no HTTP.
"""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from .errors import InvalidRequest
from .version import Version

PAGE = 100
PAGE_LIMIT = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of an answer; `next` is the cursor of the part after it, None at the end."""

    data: list[T]
    next: str | None = None


P = TypeVar("P", bound=Page)


@dataclass(frozen=True)
class Listing(Page[Version]):
    """The newest versions of some names, and where the aliases of these names point."""

    data: list[Version]  # said again: pydantic does not fill in T for a subclass
    aliases: dict[str, dict[str, int]] = field(default_factory=dict)


def check_limit(limit: int, most: int = PAGE_LIMIT) -> int:
    """A number of rows, as it came. Raises InvalidRequest."""
    if not 1 <= limit <= most:
        raise InvalidRequest(f"limit is {limit}, expected 1 to {most:,}", "limit")
    return limit


def write_cursor(question: str, place: Sequence[str | float | None]) -> str:
    """The place of a row in the answer to a question. Letters, digits, `-` and `_` only."""
    return base64.urlsafe_b64encode(json.dumps([question, *place]).encode()).decode().rstrip("=")


def read_cursor(text: str | None, question: str, kinds: Sequence[type]) -> list | None:
    """The place that `write_cursor` wrote for this question; None for None. Raises InvalidRequest."""
    if text is None:
        return None
    try:
        asked, *place = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, TypeError, RecursionError):
        asked, place = None, []
    fits = len(place) == len(kinds) and all(
        isinstance(part, kind) and not isinstance(part, bool) for part, kind in zip(place, kinds, strict=True)
    )
    if asked != question or not fits or any(isinstance(part, int) and abs(part) >= 1 << 63 for part in place):
        raise InvalidRequest(
            f"cursor is {text[:80]!r}, expected what 'next' was in an answer to this question", "cursor"
        )
    return place


def page_of(found: list[T], limit: int, question: str, place: Callable[[T], Sequence[str | float | None]]) -> Page[T]:
    """The first ``limit`` rows of one more than that, where there is one more."""
    more = len(found) > limit
    shown = found[:limit]
    return Page(shown, write_cursor(question, place(shown[-1])) if more else None)


def pages(ask: Callable[[str | None], P]) -> Iterator[P]:
    """All pages, each asked for when it is wanted."""
    page = ask(None)
    yield page
    while page.next:
        page = ask(page.next)
        yield page


def take(ask: Callable[[int, str | None], Page[T]], limit: int | None = None) -> list[T]:
    """The rows of as many pages as it takes, at most ``limit``. ``ask`` gets a page's limit and cursor."""
    size = min(limit or PAGE_LIMIT, PAGE_LIMIT)
    rows = (row for page in pages(lambda cursor: ask(size, cursor)) for row in page.data)
    return [*islice(rows, limit)]
