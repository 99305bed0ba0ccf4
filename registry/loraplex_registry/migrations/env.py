"""Alembic runs this file to migrate: on the connection, and inside the transaction, that `schema` opened.

The migrations are written for SQLite, whose integers have 64 bits and whose text is ordered by its bytes. On
PostgreSQL their columns are made so.
"""

import sqlalchemy as sa
import sqlalchemy.event
from alembic import context


def as_in_sqlite(column: sa.Column, _table: sa.Table) -> None:
    if isinstance(column.type, sa.Text):
        column.type = sa.Text(collation="C")
    elif isinstance(column.type, sa.Integer):
        column.type = sa.BigInteger()


connection: sa.Connection = context.config.attributes["connection"]
context.configure(connection=connection)
if connection.dialect.name == "postgresql":
    sqlalchemy.event.listen(sa.Column, "before_parent_attach", as_in_sqlite)
try:
    context.run_migrations()
finally:
    if connection.dialect.name == "postgresql":
        sqlalchemy.event.remove(sa.Column, "before_parent_attach", as_in_sqlite)
