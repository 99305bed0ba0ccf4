"""Schema 7: every long answer is found through an index, and metrics can be searched and sorted by."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_index("versions_by_time", "versions", ["created_at", "name", "number"])
    op.create_index("alias_moves_by_time", "alias_moves", ["at", "id"])
    op.create_index("deletions_by_time", "deletions", ["at", "id"])
    op.create_index("acts_by_time", "acts", ["at", "id"])
    metrics = op.create_table(
        "metrics",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Float, nullable=False),
    )
    op.create_index("metrics_by_value", "metrics", ["key", "value", "name", "number"])
    versions = sa.table(
        "versions", sa.column("name", sa.Text), sa.column("number", sa.Integer), sa.column("metrics", sa.JSON)
    )
    rows = [
        {"name": name, "number": number, "key": key, "value": value}
        for name, number, known in op.get_bind().execute(sa.select(versions)).all()
        for key, value in known.items()
    ]
    if rows:
        op.bulk_insert(metrics, rows)
