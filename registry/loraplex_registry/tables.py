"""The catalog's tables, and how a row becomes a Version or an AliasMove and back. Knows no questions."""

from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from .manifest import BaseRef
from .version import AliasMove, Version

LONG = sa.Integer().with_variant(sa.BigInteger(), "postgresql")  # SQLite's integers have 64 bits anyway
METADATA = sa.MetaData()
versions = sa.Table(
    "versions",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False, index=True),
    sa.Column("base_id", sa.Text, nullable=False),
    sa.Column("base_revision", sa.Text),
    sa.Column("base_fingerprint", sa.Text),
    sa.Column("base_quantization", sa.Text),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("targets", sa.JSON, nullable=False),
    sa.Column("bytes", LONG, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("deleted_at", sa.Text),  # the row stays, so that its number is never given again
    sa.UniqueConstraint("name", "digest"),
    sa.Index("versions_by_time", "created_at", "name", "number"),
)
aliases = sa.Table(
    "aliases",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
)
alias_moves = sa.Table(
    "alias_moves",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("alias", sa.Text, nullable=False),
    sa.Column("from_number", sa.Integer),
    sa.Column("to_number", sa.Integer),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Index("alias_moves_by_alias", "name", "alias", "id"),
    sa.Index("alias_moves_by_time", "at", "id"),
)
deletions = sa.Table(
    "deletions",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("deletions_by_version", "name", "number", "id"),
    sa.Index("deletions_by_time", "at", "id"),
)
metrics = sa.Table(  # what versions.metrics says, so that it can be searched and sorted by
    "metrics",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
    sa.Index("metrics_by_value", "key", "value", "name", "number"),
)

_names_of = (
    sa.select(sa.func.aggregate_strings(aliases.c.alias, " "))
    .where(aliases.c.name == versions.c.name, aliases.c.number == versions.c.number)
    .scalar_subquery()
    .label("aliases")
)
LIVE = versions.c.deleted_at.is_(None)
_last_action = (
    sa.select(deletions.c.action)
    .where(deletions.c.name == versions.c.name, deletions.c.number == versions.c.number)
    .order_by(deletions.c.id.desc())
    .limit(1)
    .scalar_subquery()
)
HELD = sa.or_(LIVE, _last_action != "purge")  # its bytes are there: it can be read, or restored
EVERY = sa.select(versions, _names_of)
SELECT = EVERY.where(LIVE)


def version_of(row: sa.Row[Any]) -> Version:
    """A row of EVERY or SELECT."""
    base = BaseRef(row.base_id, row.base_revision, row.base_fingerprint, row.base_quantization)
    return Version(
        name=row.name,
        number=row.number,
        digest=row.digest,
        base=base,
        rank=row.rank,
        targets=tuple(row.targets),
        bytes=row.bytes,
        metrics=row.metrics,
        parent=row.parent,
        created_at=datetime.fromisoformat(row.created_at),
        created_by=row.created_by,
        message=row.message,
        aliases=tuple(sorted((row.aliases or "").split())),
    )


def row_of(version: Version) -> dict[str, Any]:
    row = asdict(version) | {f"base_{key}": value for key, value in asdict(version.base).items()}
    row |= {"targets": list(version.targets), "created_at": version.created_at.isoformat(), "deleted_at": None}
    return {column.name: row[column.name] for column in versions.columns}


def metric_rows(version: Version) -> list[dict[str, Any]]:
    own = {"name": version.name, "number": version.number}
    return [own | {"key": key, "value": value} for key, value in version.metrics.items()]


def alias_move_of(row: sa.Row[Any]) -> AliasMove:
    move = AliasMove(row.name, row.alias, row.from_number, row.to_number, row.who, row.at, row.reason, row.action)
    return replace(move, at=datetime.fromisoformat(row.at), id=row.id)
