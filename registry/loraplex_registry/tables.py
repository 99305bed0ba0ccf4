"""The catalog's tables, and how a row becomes a Version or an AliasMove and back. Knows no questions."""

from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from .manifest import BaseRef
from .schema import METADATA
from .version import AliasMove, Dataset, Lineage, Template, Version

LONG = sa.Integer().with_variant(sa.BigInteger(), "postgresql")  # SQLite's integers have 64 bits anyway
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
    sa.Column("description", sa.Text, nullable=False, server_default=""),
    sa.Column("dataset", sa.Text, nullable=False, server_default=""),  # of the lineage, what is searched for
    sa.Column("run", sa.Text, nullable=False, server_default=""),
    sa.Column("lineage", sa.JSON),
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
tags = sa.Table(
    "tags",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("tag", sa.Text, primary_key=True),
    sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
    sa.Index("tags_by_tag", "tag", "name", "number"),
)
tag_changes = sa.Table(
    "tag_changes",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("tag", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Index("tag_changes_by_name", "name", "id"),
    sa.Index("tag_changes_by_time", "at", "id"),
)

_names_of = (
    sa.select(sa.func.aggregate_strings(aliases.c.alias, " "))
    .where(aliases.c.name == versions.c.name, aliases.c.number == versions.c.number)
    .scalar_subquery()
    .label("aliases")
)
_tags_of = (
    sa.select(sa.func.aggregate_strings(tags.c.tag, " "))
    .where(tags.c.name == versions.c.name, tags.c.number == versions.c.number)
    .scalar_subquery()
    .label("tags")
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
EVERY = sa.select(versions, _names_of, _tags_of)
SELECT = EVERY.where(LIVE)


def begins(column: sa.ColumnElement[Any], prefix: str) -> tuple[sa.ColumnElement[bool], ...]:
    """What holds for a name that begins with a prefix; nothing has to for an empty one."""
    return (column.startswith(prefix, autoescape=True),) if prefix else ()


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
        tags=tuple(sorted((row.tags or "").split())),
        description=row.description,
        lineage=lineage_of(row.lineage),
    )


def row_of(version: Version) -> dict[str, Any]:
    row = asdict(version) | {f"base_{key}": value for key, value in asdict(version.base).items()}
    row |= {"targets": list(version.targets), "created_at": version.created_at.isoformat(), "deleted_at": None}
    row["dataset"], row["run"] = dataset_text(version.lineage), version.lineage.run or ""
    return {column.name: row[column.name] for column in versions.columns}


def dataset_text(lineage: Lineage) -> str:
    """What is searched and sorted by of an adapter's datasets."""
    return "\n".join(f"{one.split} {one.path} sha256:{one.sha256}" for one in lineage.datasets)


def lineage_of(row: dict[str, Any] | None) -> Lineage:
    """What `row_of` kept of a lineage; nothing of a version from before there was any."""
    if row is None:
        return Lineage()
    template = row["template"] | {"stop": tuple(row["template"]["stop"])}
    datasets = tuple(Dataset(**one) for one in row["datasets"])
    return Lineage(**row | {"datasets": datasets, "template": Template(**template)})


def metric_rows(version: Version) -> list[dict[str, Any]]:
    own = {"name": version.name, "number": version.number}
    return [own | {"key": key, "value": value} for key, value in version.metrics.items()]


def alias_move_of(row: sa.Row[Any]) -> AliasMove:
    move = AliasMove(row.name, row.alias, row.from_number, row.to_number, row.who, row.at, row.reason, row.action)
    return replace(move, at=datetime.fromisoformat(row.at), id=row.id)
