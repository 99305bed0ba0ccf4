"""The catalog in one SQLite file: its connections and transactions, its schema, and the lock of those who publish.

Reading works where the folder may not be written. Knows no rows; the schema's number is SQLite's user_version.
"""

import fcntl
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
import sqlalchemy.event
import sqlalchemy.exc

from .errors import RegistryError, StoreUnavailable
from .schema import SCHEMA_VERSION, check_schema, migrate

BUSY_SECONDS = 30.0


class SqliteDatabase:
    """One file, shared by threads and processes."""

    def __init__(self, file: Path) -> None:
        """Open the file, making it first if need be. Raises StoreUnavailable."""
        self.file, self.where, self._lock = file, str(file), file.with_name("publish.lock")
        if not file.exists():
            _create(file)
        self.writable = os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)
        # A read-only catalog gets a fresh connection per read: SQLite's immutable mode never looks again.
        pool: dict[str, Any] = {"pool_size": 8, "max_overflow": 56} if self.writable else {}
        self._engine = sa.create_engine(
            "sqlite://", creator=self._connect, poolclass=sa.QueuePool if self.writable else sa.NullPool, **pool
        )
        sqlalchemy.event.listen(self._engine, "begin", _begin)
        try:
            with self.reading() as db:
                _check(_found_schema(db), file)
        except StoreUnavailable:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to ask with. Raises StoreUnavailable."""
        with _one_clear_error(self.file), self._engine.connect() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is the only one to write, and sees all that was written. Raises StoreUnavailable."""
        if not self.writable:
            raise StoreUnavailable(f"the registry '{self.file.parent}' cannot be written by this user")
        with _one_clear_error(self.file), self._engine.connect() as db, db.execution_options(immediate=True).begin():
            yield db

    @contextmanager
    def publishing(self) -> Iterator[Callable[[], AbstractContextManager[sa.Connection]]]:
        """While this is held, nobody collects. Gives the way to write while it is."""
        with _locked(self._lock, fcntl.LOCK_SH):
            yield self.writing

    def collecting(self) -> AbstractContextManager[None]:
        """While this is held, nobody publishes. Waits until those who do are done."""
        return _locked(self._lock, fcntl.LOCK_EX)

    def _connect(self) -> sqlite3.Connection:
        if self.writable:
            return _open(self.file, "mode=rw")
        try:
            return _open(self.file, "mode=ro")
        except sqlite3.OperationalError:
            # No writer has it open (its -shm file is not there) and we may not make one: the file stands still.
            return _open(self.file, "immutable=1")


def upgrade_file(file: Path) -> tuple[int, int]:
    """As `upgrade_catalog`. Raises StoreUnavailable."""
    if not file.exists():
        raise StoreUnavailable(f"there is no registry in '{file.parent}': it has no {file.name}")
    with _one_clear_error(file), _migrating(file) as db:
        before = _found_schema(db)
        if not 1 <= before < SCHEMA_VERSION:
            _check(before, file)
            return before, before
        _migrate(db)
        return before, SCHEMA_VERSION


def _check(found: int, file: Path) -> None:
    check_schema(found, f"'{file}'", f"run `registry --registry {file.parent} db upgrade`")


def _found_schema(db: sa.Connection) -> int:
    """The schema of the catalog; 0 of an empty file."""
    return db.exec_driver_sql("PRAGMA user_version").scalar_one()


def _migrate(db: sa.Connection) -> None:
    migrate(db, _found_schema(db))
    db.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")  # every release, the first one too, looks at this


def _create(file: Path) -> None:
    """Make the catalog beside its place and link it there whole: of two makers one wins, a killed one leaves none."""
    with _one_clear_error(file):
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".catalog.")
        os.close(handle)
        try:
            with closing(_open(Path(partial), "mode=rw")) as raw:
                raw.execute("PRAGMA journal_mode=WAL")
            with _migrating(Path(partial)) as db:
                _migrate(db)
            with Path(partial).open("rb") as stream:
                os.fsync(stream.fileno())
            os.link(partial, file)
        except FileExistsError:
            return
        finally:
            for leftover in file.parent.glob(f"{Path(partial).name}*"):
                leftover.unlink(missing_ok=True)


@contextmanager
def _migrating(file: Path) -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://", creator=lambda: _open(file, "mode=rw"), poolclass=sa.NullPool)
    sqlalchemy.event.listen(engine, "begin", _begin)
    with engine.connect() as db, db.execution_options(immediate=True).begin():
        yield db


def _begin(db: sa.Connection) -> None:
    # IMMEDIATE takes the write lock before reading, so that two pushes never see the same last number.
    db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get("immediate") else "BEGIN")


def _open(file: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"file:{quote(str(file.absolute()))}?{mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,  # SQLAlchemy's "begin" event says when a transaction begins
        check_same_thread=False,  # the pool hands a connection to one thread at a time
    )
    try:
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        db.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error:
        db.close()
        raise
    return db


@contextmanager
def _locked(file: Path, how: int) -> Iterator[None]:
    """A lock between processes and between threads: it belongs to this opening of the file, and ends with it."""
    with file.open("ab") as stream:
        fcntl.flock(stream, how)
        yield


@contextmanager
def _one_clear_error(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlalchemy.exc.DBAPIError as error:
        raise StoreUnavailable(f"the catalog '{file}' cannot be used: {error.orig}") from error
    except sqlite3.Error as error:
        raise StoreUnavailable(f"the catalog '{file}' cannot be used: {error}") from error
    except RegistryError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"the registry '{file.parent}' cannot be written: {error.strerror}") from error
