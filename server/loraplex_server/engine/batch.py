"""What one step computes: some tokens of some requests, all under one adapter. No torch."""

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
    """The rows of one step. ``adapter`` is their common adapter's digest, or None for the base alone."""

    adapter: str | None
    rows: tuple[Row, ...]
