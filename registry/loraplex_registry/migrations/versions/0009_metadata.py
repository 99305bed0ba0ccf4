"""Schema 9: what a version is about (card, datasets, run, template), and tags that people put on it and take off."""

import sqlalchemy as sa
from alembic import op

from loraplex_registry.ledgers import only_grows

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    for column in ("description", "dataset", "run"):
        op.add_column("versions", sa.Column(column, sa.Text, nullable=False, server_default=""))
    op.add_column("versions", sa.Column("lineage", sa.JSON))
    op.create_table(
        "tags",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("tag", sa.Text, primary_key=True),
        sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
    )
    op.create_index("tags_by_tag", "tags", ["tag", "name", "number"])
    op.create_table(
        "tag_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("tag", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("at", sa.Text, nullable=False),
    )
    op.create_index("tag_changes_by_name", "tag_changes", ["name", "id"])
    op.create_index("tag_changes_by_time", "tag_changes", ["at", "id"])
    only_grows("tag_changes", "the ledger of tags is append-only")
