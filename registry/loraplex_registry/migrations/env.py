"""Alembic runs this file to migrate: on the connection, and inside the transaction, that `schema` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
