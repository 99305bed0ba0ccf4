"""Which pages of the KV cache belong to which request. Bookkeeping only: no torch.

Pages are reserved for the longest a request can grow before it is admitted, so a running request never runs out.
"""

from loraplex_server.engine.request import Request


class KVPages:
    """A pool of ``pages`` pages of ``page_tokens`` tokens each, handed out whole to requests."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))
        self._owned: dict[str, list[int]] = {}

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return 1 - len(self._free) / self.pages

    def fits_ever(self, request: Request) -> bool:
        """Whether the request would fit an empty cache."""
        return self._needed(request) <= self.pages

    def can_allocate(self, request: Request) -> bool:
        """Whether it fits now, grown to its longest."""
        return self._needed(request) <= len(self._free)

    def allocate(self, request: Request) -> None:
        """Reserve the pages of a request for its whole life."""
        assert request.id not in self._owned and self.can_allocate(request)
        self._owned[request.id] = [self._free.pop() for _ in range(self._needed(request))]

    def free(self, request: Request) -> None:
        """Give the pages back; nothing happens if it holds none."""
        self._free.extend(self._owned.pop(request.id, ()))

    def slots(self, request: Request, start: int, stop: int) -> list[int]:
        """Where the tokens ``start`` up to ``stop`` of a request lie in the cache."""
        pages, size = self._owned[request.id], self.page_tokens
        return [pages[i // size] * size + i % size for i in range(start, stop)]

    def _needed(self, request: Request) -> int:
        return -(-request.most_tokens // self.page_tokens)
