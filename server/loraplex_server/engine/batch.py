"""What one step computes: some tokens of some requests, the rows of one adapter side by side. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from loraplex_server.engine.request import Request


@dataclass(frozen=True)
class Row:
    """The tokens ``start`` up to ``stop`` of a request, as it stood when the step was planned."""

    request: Request
    start: int
    stop: int
    samples: bool  # it reaches the end of the sequence, so that a token can be sampled from it
    kept: int  # how many of its tokens, at its end, have their logits looked at

    @classmethod
    def of(cls, request: Request, tokens: int) -> "Row":
        """``tokens`` more tokens of a request, from its first that is not in the cache."""
        start = request.computed_tokens
        stop = start + tokens
        samples = stop == request.total_tokens
        unscored = request.unscored_from
        kept = int(samples) if unscored is None else max(int(samples), min(tokens, stop - unscored))
        return cls(request, start, stop, samples, kept)

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

    @property
    def sampling(self) -> int:
        """How many rows are sampled from."""
        return sum(row.samples for row in self.rows)

    @property
    def sampled_from(self) -> list[int]:
        """Where the logits that are sampled from lie among those that are kept."""
        ends = accumulate(row.kept for row in self.rows)
        return [end - 1 for end, row in zip(ends, self.rows, strict=True) if row.samples]
