"""The catalog in a PostgreSQL database, for registries that several machines serve: connections, schema and locks.

All locks are advisory locks of one transaction, so they end with it, and with the connection of who held them. Knows
no rows; the schema's number is Alembic's own mark. No error and no log names the password.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sqlalchemy as sa
import sqlalchemy.exc

from .errors import InvalidRequest, StoreUnavailable
from .schema import SCHEMA_VERSION, check_schema, migrate

CONNECT_SECONDS = 10
WRITE_WAIT = "30s"  # as long as SQLite waits for another writer
# Connections of one process: kept, and taken beyond. PostgreSQL takes 100 in all unless it is told otherwise.
READERS, WRITERS = (8, 16), (2, 6)
LOCKS = 0x6C70  # the first key of all our locks
WRITE, PUBLISH, SCHEMA = 1, 2, 3
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
DRIVER = "PostgreSQL needs its driver: pip install 'loraplex[postgres]'"


class PostgresDatabase:
    """A database by its URL, shared by threads, processes and machines."""

    def __init__(self, url: str, connect_seconds: int = CONNECT_SECONDS) -> None:
        """Raises StoreUnavailable when the URL or the driver is not there for it; connects to nothing yet.

        The URL's own `connect_timeout` goes before `connect_seconds`.
        """
        self._url = read_url(url, connect_seconds)
        at = self._url
        self.where = sa.URL.create("postgresql", at.username, None, at.host, at.port, at.database).render_as_string()
        # Whoever waits for a lock must not have the connection that its holder needs next: those who read wait for
        # none, those who write for WRITE alone, and those who publish or collect have a connection each.
        self._reader = self._pooled(*READERS).execution_options(isolation_level="AUTOCOMMIT")
        self._writer = self._pooled(*WRITERS)
        self._single = self._made(poolclass=sa.NullPool)

    def open(self) -> None:
        """Make the schema in an empty database. Raises StoreUnavailable, also for a schema that is not ours."""
        with self.reading() as db:
            found = self._found_schema(db)
        if not found:
            with self._one_clear_error(), self._single.begin() as db:
                _lock(db, "pg_advisory_xact_lock", SCHEMA)
                found = self._found_schema(db)  # somebody may have been faster
                if not found:
                    migrate(db, 0)
                    found = SCHEMA_VERSION
        self._check(found)

    def close(self) -> None:
        for engine in (self._reader, self._writer):
            engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to ask with; each statement sees what is committed then. Raises StoreUnavailable."""
        with self._one_clear_error(), self._reader.connect() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is the only one to write, and sees all that was written. Raises StoreUnavailable.

        One writer at a time gives numbers without gaps, and the ledger's ids in the order in which they are seen.
        """
        with self._one_clear_error(), self._writer.begin() as db:
            _wait_to_write(db)
            yield db

    @contextmanager
    def publishing(self) -> Iterator[Callable[[], AbstractContextManager[sa.Connection]]]:
        """While this is held, nobody collects. Gives the way to write, once, while it is.

        That is the transaction that holds the lock: who lost it writes no row. Raises StoreUnavailable.
        """
        with self._one_clear_error(), self._single.begin() as db:
            _stay(db)
            _lock(db, "pg_advisory_xact_lock_shared", PUBLISH)

            @contextmanager
            def writing() -> Iterator[sa.Connection]:
                _wait_to_write(db)
                yield db

            yield writing

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While this is held, nobody publishes. Waits until those who do are done. Raises StoreUnavailable."""
        with self._one_clear_error(), self._single.begin() as db:
            _stay(db)
            _lock(db, "pg_advisory_xact_lock", PUBLISH)
            yield

    def upgrade(self) -> tuple[int, int]:
        """As `upgrade_catalog`; an empty database gets the schema, as it does when it is opened.

        Raises StoreUnavailable.
        """
        with self._one_clear_error(), self._single.begin() as db:
            _lock(db, "pg_advisory_xact_lock", SCHEMA)
            before = self._found_schema(db)
            if before >= SCHEMA_VERSION:
                self._check(before)
                return before, before
            _wait_to_write(db)
            migrate(db, before)
            return before, SCHEMA_VERSION

    def _pooled(self, kept: int, beyond: int) -> sa.Engine:
        # A connection that was lost is noticed before it is used again, and replaced.
        return self._made(pool_pre_ping=True, pool_size=kept, max_overflow=beyond)

    def _made(self, **options: Any) -> sa.Engine:
        try:
            return sa.create_engine(self._url, hide_parameters=True, **options)
        except ModuleNotFoundError as error:
            raise StoreUnavailable(DRIVER) from error

    def _found_schema(self, db: sa.Connection) -> int:
        """The schema of the catalog; 0 where there is none. Raises StoreUnavailable for another program's mark."""
        if not db.scalar(sa.text("SELECT to_regclass('alembic_version') IS NOT NULL")):
            return 0
        mark = db.scalar(sa.text("SELECT version_num FROM alembic_version"))
        if mark is None or not re.fullmatch(r"\d{4}", mark):
            raise StoreUnavailable(f"the database {self.where} holds the tables of another program: give it its own")
        return int(mark)

    def _check(self, found: int) -> None:
        check_schema(found, f"the catalog {self.where}", "run `registry db upgrade` with the same database")

    @contextmanager
    def _one_clear_error(self) -> Iterator[None]:
        try:
            yield
        except sqlalchemy.exc.DataError as error:  # for instance text with a NUL in it
            raise InvalidRequest(f"PostgreSQL does not keep this: {self._told(error)}") from error
        except sqlalchemy.exc.DBAPIError as error:
            raise StoreUnavailable(f"the catalog {self.where} cannot be used: {self._told(error)}") from error
        except sqlalchemy.exc.TimeoutError as error:
            told = "all connections that this process may have are in use"
            raise StoreUnavailable(f"the catalog {self.where} cannot be used: {told}") from error

    def _told(self, error: sqlalchemy.exc.DBAPIError) -> str:
        """The driver's words in one line, without the password."""
        text = " ".join(str(error.orig).split())
        for secret in filter(None, [self._url.password, self._url.query.get("password")]):
            text = text.replace(str(secret), "***")
        return text


def read_url(text: str, connect_seconds: int = CONNECT_SECONDS) -> sa.URL:
    """A PostgreSQL URL for SQLAlchemy. Raises StoreUnavailable, which does not repeat what may hold a password."""
    scheme, expected = re.match(r"([a-z0-9+]*)(://)?", text), "expected postgresql://user@host/name"
    assert scheme
    if not scheme[2] or scheme[1] not in SCHEMES:
        told = f"begins with {scheme[0]}" if scheme[2] else "is none"
        raise StoreUnavailable(f"the database's URL {told}, {expected}")
    try:
        url = sa.make_url(text).set(drivername="postgresql+psycopg")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StoreUnavailable(f"the database's URL cannot be read, {expected}") from None
    defaults = {"connect_timeout": str(connect_seconds), "application_name": "loraplex"}
    return url.set(query=defaults | dict(url.query))


def _wait_to_write(db: sa.Connection) -> None:
    db.execute(sa.select(sa.func.set_config("lock_timeout", WRITE_WAIT, True)))
    _lock(db, "pg_advisory_xact_lock", WRITE)


def _stay(db: sa.Connection) -> None:
    """Let the transaction wait, and idle while blobs are on their way, whatever the server's own limits are."""
    never = [sa.func.set_config(limit, "0", True) for limit in ("lock_timeout", "idle_in_transaction_session_timeout")]
    db.execute(sa.select(*never))


def _lock(db: sa.Connection, how: str, what: int) -> None:
    db.execute(sa.select(sa.cast(getattr(sa.func, how)(LOCKS, what), sa.Text)))
