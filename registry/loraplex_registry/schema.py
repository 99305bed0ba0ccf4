"""The catalog's schema: makes it, brings an older one up, and says what to do with another. Alembic's files say how.

Knows no rows, and no way to tell which schema a database has. Schema N is what migration N leaves.
"""

import threading
from pathlib import Path

import sqlalchemy as sa

from .errors import StoreUnavailable

SCHEMA_VERSION = 9
METADATA = sa.MetaData()  # of every table; the file that owns the rows declares it
MIGRATIONS = Path(__file__).parent / "migrations"
_ONE_AT_A_TIME = threading.Lock()  # Alembic's `op` and `context` are one per process


def check_schema(found: int, what: str, remedy: str) -> None:
    """Raises StoreUnavailable that says what to do when this release cannot use the catalog as it is.

    An older catalog is not upgraded by whoever opens it: it may be shared with programs of an older release, and those
    are locked out from then on. That is for a person to decide, once, with `registry db upgrade`.
    """
    if found > SCHEMA_VERSION:
        raise StoreUnavailable(
            f"{what} has schema version {found}, this loraplex reads {SCHEMA_VERSION}: a newer loraplex made it; "
            "use that one, or newer"
        )
    if found < 1:
        raise StoreUnavailable(f"{what} has schema version {found}: it is not the catalog of a registry")
    if found < SCHEMA_VERSION:
        raise StoreUnavailable(f"{what} has schema version {found}, this loraplex reads {SCHEMA_VERSION}: {remedy}")


def migrate(db: sa.Connection, found: int) -> None:
    """Bring a catalog of a schema, 0 of an empty one, to SCHEMA_VERSION, inside the caller's transaction."""
    # Here, not above: it costs a fifth of a second that opening a catalog need not pay.
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": db})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with _ONE_AT_A_TIME:
        if found:
            command.stamp(config, f"{found:04}")  # a catalog of the first release has no mark of Alembic's
        command.upgrade(config, f"{SCHEMA_VERSION:04}")
