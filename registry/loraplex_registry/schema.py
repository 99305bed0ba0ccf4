"""The catalog's schema: makes it, brings an older one up, and says which one a catalog has. Alembic's files say how.

Knows no rows. Schema N is what migration N leaves. SQLite's user_version holds N, so that every release, the first
one too, refuses what is too new for it.
"""

import threading
from pathlib import Path

import sqlalchemy as sa

from .errors import StoreUnavailable

SCHEMA_VERSION = 2
MIGRATIONS = Path(__file__).parent / "migrations"
_ONE_AT_A_TIME = threading.Lock()  # Alembic's `op` and `context` are one per process


def found_schema(db: sa.Connection) -> int:
    """The schema of the catalog; 0 of an empty file."""
    return db.exec_driver_sql("PRAGMA user_version").scalar_one()


def check_schema(db: sa.Connection, file: Path) -> None:
    """Raises StoreUnavailable that says what to do when this release cannot use the catalog as it is.

    An older catalog is not upgraded by whoever opens it: the folder may be shared with programs of an older release,
    and those are locked out from then on. That is for a person to decide, once, with `registry db upgrade`.
    """
    found = found_schema(db)
    if found > SCHEMA_VERSION:
        raise StoreUnavailable(
            f"'{file}' has schema version {found}, this loraplex reads {SCHEMA_VERSION}: a newer loraplex made it; "
            "use that one, or newer"
        )
    if found < 1:
        raise StoreUnavailable(f"'{file}' has schema version {found}: it is not the catalog of a registry")
    if found < SCHEMA_VERSION:
        raise StoreUnavailable(
            f"'{file}' has schema version {found}, this loraplex reads {SCHEMA_VERSION}: "
            f"run `registry --registry {file.parent} db upgrade`"
        )


def migrate(db: sa.Connection) -> None:
    """Bring an empty or an older catalog to SCHEMA_VERSION, inside the caller's transaction: all of it or nothing."""
    # Here, not above: it costs a fifth of a second that opening a catalog need not pay.
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": db})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with _ONE_AT_A_TIME:
        if found := found_schema(db):
            command.stamp(config, f"{found:04}")  # a catalog of the first release has no mark of Alembic's
        command.upgrade(config, f"{SCHEMA_VERSION:04}")
    db.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
