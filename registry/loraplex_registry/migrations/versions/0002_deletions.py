"""Schema 2: versions can be deleted and restored, and a ledger says who did it, when and why."""

import sqlalchemy as sa
from alembic import op

from loraplex_registry.ledgers import only_grows

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("versions", sa.Column("deleted_at", sa.Text))
    op.create_table(
        "deletions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_index("deletions_by_version", "deletions", ["name", "number", "id"])
    only_grows("deletions", "the ledger of deletions is append-only")
