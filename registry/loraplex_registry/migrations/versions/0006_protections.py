"""Schema 6: rules that protect aliases, and a ledger of who approved what."""

import sqlalchemy as sa
from alembic import op

from loraplex_registry.ledgers import only_grows

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "protections",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("alias", sa.Text, primary_key=True),
        sa.Column("require", sa.JSON, nullable=False),
        sa.Column("signed_by", sa.JSON, nullable=False),
        sa.Column("approvers", sa.JSON, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
    )
    op.create_table(
        "approvals",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
        sa.UniqueConstraint("name", "number", "alias", "who"),
    )
    only_grows("approvals", "the ledger of approvals is append-only")
