"""Where the catalog's rows lie: what a database must do for it, and which one is meant.

Knows no rows. SQLite and PostgreSQL have a file each.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import sqlalchemy as sa

Writing = Callable[[], AbstractContextManager[sa.Connection]]


class Database(Protocol):
    """Connections and locks, for many threads and processes. All raise StoreUnavailable."""

    def close(self) -> None: ...

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """A connection to ask with."""
        ...

    def writing(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that is the only one to write, and sees all that was written."""
        ...

    def publishing(self) -> AbstractContextManager[Writing]:
        """While this is held, nobody collects. Gives the way to write while it is."""
        ...

    def collecting(self) -> AbstractContextManager[None]:
        """While this is held, nobody publishes. Waits until those who do are done."""
        ...
