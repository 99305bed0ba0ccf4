"""Schema 8: an alias can be removed, which its ledger says by a move to nothing."""

import sqlalchemy as sa
from alembic import op

from loraplex_registry.ledgers import only_grows

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    with op.batch_alter_table("alias_moves") as table:
        table.alter_column("to_number", existing_type=sa.Integer, nullable=True)
    if op.get_bind().dialect.name == "sqlite":  # it makes the table anew, without its triggers
        only_grows("alias_moves", "the alias ledger is append-only")
