"""The ledger of acts that no other ledger tells: tokens, signatures, rules. It only grows; the audit log reads it.

Knows no catalog: it is handed a connection, inside whose transaction the act is done.
"""

from datetime import UTC, datetime

import sqlalchemy as sa

from .schema import METADATA

acts = sa.Table(
    "acts",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text),  # the adapter's, so that its audit finds it; none of what concerns no adapter
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("acts_by_time", "at", "id"),
)


def note(db: sa.Connection, name: str | None, action: str, subject: str, who: str, reason: str = "") -> datetime:
    """Write one down; returns when it was."""
    at = datetime.now(UTC)
    row = {"name": name, "action": action, "subject": subject, "who": who, "at": at.isoformat(), "reason": reason}
    db.execute(acts.insert().values(row))
    return at
