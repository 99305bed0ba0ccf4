"""The drafts of a registry server, as RemoteRegistry's `drafts`: what there is to read of Drafts, over HTTP."""

from collections.abc import Callable
from typing import Any

from .drafts import OpenDraft
from .pages import PAGE, Page, take
from .reference import check_name


class RemoteDrafts:
    """`ask` is RemoteRegistry's way to a page."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def page(self, name: str | None = None, limit: int = PAGE, cursor: str | None = None) -> Page[OpenDraft]:
        return self._ask(Page[OpenDraft], "/v1/drafts", limit, cursor, name=None if name is None else check_name(name))

    def list(self, name: str | None = None) -> "list[OpenDraft]":
        return take(lambda size, cursor: self.page(name, size, cursor))
