"""What one step computes: some tokens of some requests, the rows of one adapter side by side. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex_server.engine.request import Request


@dataclass(frozen=True)
class Row:
    """The tokens ``start`` up to ``stop`` of a request, as it stood when the step was planned."""

    request: Request
    start: int
    stop: int
    samples: bool  # it reaches the end of the sequence, so that a token can be sampled from it

    @classmethod
    def of(cls, request: Request, tokens: int) -> "Row":
        """``tokens`` more tokens of a request, from its first that is not in the cache."""
        start = request.computed_tokens
        return cls(request, start, start + tokens, start + tokens == request.total_tokens)

    @property
    def tokens(self) -> int:
        """How many tokens the row adds to the step."""
        return self.stop - self.start


@dataclass(frozen=True)
class Batch:
    """The rows of one step, grouped by adapter: rows of one adapter follow each other."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Batch":
        """Group rows; the base's come first."""
        return cls(tuple(sorted(rows, key=lambda row: row.request.adapter or "")))

    @property
    def adapters(self) -> frozenset[str | None]:
        """Whose rows these are: digests, and None for the base."""
        return frozenset(row.request.adapter for row in self.rows)
