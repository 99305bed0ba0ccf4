"""The moves of aliases as they are made: a Watch waits for the next one, reads on after a cut, and ends when closed.

Owns the place in the ledger, so that no move is lost or told twice. Where the rows come from, a catalog or a server, is
the source's to say; LedgerSource is a catalog's.
"""

import threading
from collections.abc import Callable, Generator
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from .catalog import Catalog
from .errors import (
    Forbidden,
    InvalidReference,
    InvalidRequest,
    RateLimited,
    RegistryError,
    RemoteError,
    StoreUnavailable,
    TooManyWatchers,
    Unauthorized,
    UnknownAdapter,
)
from .reference import Reference
from .tokens import silent_of_others
from .version import AliasMove

POLL_SECONDS = 0.2  # one look at the ledger's last row
BATCH = 500  # rows that are read at once
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0  # between tries to reach a registry that went away

Row = tuple[int, AliasMove | None]  # where the ledger has been read to, and the move that is there; None: no more yet


def ignore(_error: RegistryError) -> None:
    """Say nothing about a cut."""


class Source(Protocol):
    """Where a Watch reads."""

    def rows(self, after: int | None) -> Generator[Row]:
        """The rows after one, or from now on; first of all the place where it begins. Ends when it is cut."""
        ...

    def wake(self) -> None:
        """Let a `next()` that waits in another thread return or raise."""
        ...


class Watch:
    """An iterator over moves, oldest first, that waits for the next one. `after` is the id of the last row seen.

    A registry that goes away is waited for: `cut` is told why, once, and the next move is the one that would have come.
    `close` may be called from any thread and ends the iteration.
    """

    def __init__(self, source: Source, after: int | None, cut: Callable[[RegistryError], None] = ignore) -> None:
        """Begin to read. Raises what is wrong with the question, or RemoteError when nobody answers it."""
        self._source, self._cut = source, cut
        self._closed, self._reading = threading.Event(), threading.RLock()  # a generator is for one thread at a time
        self._failures = 0
        self._reached_at: float | None = monotonic()  # when the first of these rows came
        self._rows: Generator[Row] | None = source.rows(after)
        first = next(self._rows, None)
        if first is None:
            raise RemoteError("the registry ended the stream before it began")
        self.after, _ = first

    def close(self) -> None:
        self._closed.set()
        self._source.wake()
        if self._reading.acquire(blocking=False):  # else the thread that reads lets go itself
            self._let_go()
            self._reading.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AliasMove:
        with self._reading:
            while not self._closed.is_set():
                if (move := self._read()) and not self._closed.is_set():
                    return move
            self._let_go()
            raise StopIteration

    def _read(self) -> AliasMove | None:
        """The next move, or None where there is none yet. A cut is noted, and waited over."""
        if self._rows is None:
            self._rows, self._reached_at = self._source.rows(self.after), None
        try:
            seen, move = next(self._rows)
        except StopIteration:
            self._lost(RemoteError("the registry ended the stream"))
        except (Unauthorized, Forbidden):
            raise
        except (RemoteError, StoreUnavailable, TooManyWatchers, RateLimited) as error:
            self._lost(error)
        else:
            self._reached_at = self._reached_at or monotonic()
            fresh, self.after = seen > self.after, max(seen, self.after)
            return move if fresh else None
        return None

    def _lost(self, error: RegistryError) -> None:
        self._let_go()
        if self._reached_at and monotonic() - self._reached_at > LONGEST_PAUSE_SECONDS:
            self._failures = 0  # it was well for a while
        if not self._failures and not self._closed.is_set():
            self._cut(error)
        self._closed.wait(min(FIRST_PAUSE_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS))
        self._failures = min(self._failures + 1, 16)

    def _let_go(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None


class LedgerReader:
    """One reader's place in a catalog's ledger, and what it reads there: everything, a name, or one alias of it."""

    def __init__(self, catalog: Catalog, ref: str | None, after: int | None, prefix: str = "") -> None:
        """At `after`, or at the ledger's end; of names that begin with a prefix.

        Raises InvalidReference, UnknownAdapter, InvalidRequest.
        """
        self._catalog, self._prefix = catalog, prefix
        self._name, self._alias = parse_watched(ref)
        if self._name and not self._name.startswith(prefix):
            raise UnknownAdapter(str(ref))
        if self._name:
            with silent_of_others(prefix):
                catalog.resolve(Reference(self._name))  # else a mistyped name would be waited for in silence
        last = catalog.last_move(prefix)
        if after is not None and not 0 <= after <= last:
            raise InvalidRequest(f"after is {after}, expected 0 to {last}, the id of the ledger's last row", "after")
        self.after = last if after is None else after

    def read(self) -> list[AliasMove]:
        """What came since, at most BATCH moves of it; none when there is no more."""
        last = self._catalog.last_move(self._prefix)
        if last <= self.after:
            return []
        moves = self._catalog.moves(self.after, self._name, self._alias, BATCH, self._prefix)
        seen = moves[-1].id if moves else 0
        self.after = seen if len(moves) == BATCH else max(last, seen)  # nothing of ours is left up to `last`
        return moves


class LedgerSource:
    """The ledger of a registry in a folder: what any process appends to it is seen within POLL_SECONDS."""

    def __init__(self, catalog: Catalog, ref: str | None) -> None:
        self._catalog, self._ref = catalog, ref
        self._woken = threading.Event()

    def rows(self, after: int | None) -> Generator[Row]:
        reader = LedgerReader(self._catalog, self._ref, after)
        yield reader.after, None
        while not self._woken.is_set():
            for move in (moves := reader.read()):
                yield move.id, move
            if not moves:
                yield reader.after, None
                self._woken.wait(POLL_SECONDS)

    def wake(self) -> None:
        self._woken.set()


def parse_watched(ref: str | None) -> tuple[str | None, str | None]:
    """The name and the alias that a watch is for, each None for all. Raises InvalidReference."""
    if ref is None:
        return None, None
    parsed = Reference.parse(ref)
    if parsed.version is not None or parsed.digest is not None:
        raise InvalidReference(f"'{ref}' is a version, which no alias moves away from: expected name or name@alias")
    return parsed.name, parsed.alias
