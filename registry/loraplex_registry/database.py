"""Where the catalog's rows lie: what a database must do for it, and which one is meant.

Knows no rows. SQLite and PostgreSQL have a module each.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from .errors import StoreUnavailable
from .postgres import PostgresDatabase
from .sqlite import SqliteDatabase, upgrade_file

Writing = Callable[[], AbstractContextManager[sa.Connection]]


class Database(Protocol):
    """Connections and locks, for many threads and processes. All raise StoreUnavailable."""

    where: str  # for people, without a password

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


def open_database(file: Path, url: str | None) -> Database:
    """The database behind a URL, else the file, made if it is new. Raises StoreUnavailable."""
    if not url:
        return SqliteDatabase(file)
    database = PostgresDatabase(url)
    try:
        database.open()
    except StoreUnavailable:
        database.close()
        raise
    return database


def upgrade_catalog(file: Path, url: str | None) -> tuple[int, int]:
    """Bring a catalog's schema to this release's, in one transaction; returns the schema before and after.

    Raises StoreUnavailable: there is no catalog, it is newer, it cannot be written.
    """
    if not url:
        return upgrade_file(file)
    database = PostgresDatabase(url)
    try:
        return database.upgrade()
    finally:
        database.close()
