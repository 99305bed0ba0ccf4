"""The rows: versions, where each alias points, and the ledger of its moves. SQLAlchemy Core, on any Database.

Allots version numbers and moves aliases, each in one transaction. Knows no files.
"""

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa

from .database import Database, Writing
from .errors import (
    DeletedVersion,
    InvalidRequest,
    NotDeleted,
    NotFound,
    NothingToRollBack,
    NumberTaken,
    RequirementNotMet,
    UnknownAdapter,
    UnknownAlias,
    UnknownDigest,
    UnknownVersion,
    VersionInUse,
)
from .query import Comparison
from .reference import Reference
from .tables import (
    EVERY,
    HELD,
    LIVE,
    SELECT,
    alias_move_of,
    alias_moves,
    aliases,
    begins,
    deletions,
    metric_rows,
    metrics,
    row_of,
    tag_changes,
    tags,
    version_of,
    versions,
)
from .version import AliasMove, Deletion, Version, previous_target

PRODUCTION = "production"
Unmet = Callable[[sa.Connection, Version, str], list[str]]  # what an alias's rule asks and the version does not have


class Catalog:
    """The rows in a database, shared by threads, processes and, where the database is, by machines."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._read, self._write = database.reading, database.writing
        self.reading, self.writing = database.reading, database.writing  # for the files that own other tables
        self.collecting = database.collecting

    def close(self) -> None:
        self._database.close()

    # --- questions ---

    def resolve(self, ref: Reference) -> Version:
        """The version a reference stands for now. Raises the kind of NotFound that fits."""
        with self._read() as db:
            return self._resolve(db, ref)

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, oldest first. Raises UnknownAdapter."""
        with self._read() as db:
            rows = db.execute(SELECT.where(versions.c.name == name).order_by(versions.c.number)).all()
            if not rows:
                raise self._not_found(db, Reference(name))
        return [version_of(row) for row in rows]

    def all(self) -> list[Version]:
        """Every version, by name and number."""
        with self._read() as db:
            return [version_of(row) for row in db.execute(SELECT.order_by(versions.c.name, versions.c.number))]

    def aliases(self) -> dict[str, dict[str, int]]:
        """Where every alias points: name → alias → version number."""
        found: dict[str, dict[str, int]] = {}
        with self._read() as db:
            for row in db.execute(sa.select(aliases).order_by(aliases.c.name, aliases.c.alias)):
                found.setdefault(row.name, {})[row.alias] = row.number
        return found

    def history(self, name: str, alias: str) -> list[AliasMove]:
        """An alias's moves, oldest first. Raises UnknownAdapter, UnknownAlias."""
        with self._read() as db:
            return self._history(db, name, alias)

    def last_move(self, prefix: str = "") -> int:
        """The id of the ledger's last row; 0 when it has none. A row that comes later has a higher one.

        Of names that begin with a prefix, as in `moves`.
        """
        with self._read() as db:
            return db.scalar(sa.select(sa.func.max(_ledger(prefix).c.id))) or 0

    def moves(self, after: int, name: str | None, alias: str | None, limit: int, prefix: str = "") -> list[AliasMove]:
        """The ledger's rows after an id, oldest first, at most ``limit``: of a name and an alias, None meaning all.

        Of names that begin with a prefix; ids are then places among these, which do not tell how many others there are.
        """
        ledger = _ledger(prefix)
        wanted = [ledger.c[column] == word for column, word in (("name", name), ("alias", alias)) if word]
        found = sa.select(ledger).where(ledger.c.id > after, *wanted).order_by(ledger.c.id).limit(limit)
        with self._read() as db:
            return [alias_move_of(row) for row in db.execute(found)]

    def place(self, move: AliasMove, prefix: str) -> int:
        """The id that a move has among those of names that begin with a prefix."""
        earlier = sa.select(sa.func.count()).where(alias_moves.c.id <= move.id, *begins(alias_moves.c.name, prefix))
        with self._read() as db:
            return db.scalar(earlier) or 0

    def digests(self, prefix: str) -> list[str]:
        """The digests of all versions, deleted ones too, of names that begin with a prefix."""
        with self._read() as db:
            return list(db.scalars(sa.select(versions.c.digest).where(*begins(versions.c.name, prefix)).distinct()))

    def named(self, digest: str) -> list[tuple[str, int]]:
        """The names and numbers of the versions with a digest that are not deleted."""
        mine = sa.select(versions.c.name, versions.c.number).where(versions.c.digest == digest, LIVE)
        with self._read() as db:
            return [(name, number) for name, number in db.execute(mine.order_by(versions.c.name, versions.c.number))]

    # --- acts ---

    @contextmanager
    def publishing(self) -> Iterator[Callable[..., Version]]:
        """While this is held, no blob is removed: around putting a version's blobs in place and writing its row.

        Gives the act that writes the row: it gives a draft its number, or returns the version of that name that has
        its digest already. If that one was deleted, it is restored. Where a number is given too and the draft would get
        another, it raises and changes nothing: NumberTaken, or InvalidRequest for a number that no version has yet.
        """
        with self._database.publishing() as writing:
            yield partial(self._add, writing)

    def _add(self, writing: Writing, draft: Version, number: int | None = None) -> Version:
        with writing() as db:
            same = db.execute(EVERY.where(versions.c.name == draft.name, versions.c.digest == draft.digest)).first()
            last = db.scalar(sa.select(sa.func.max(versions.c.number)).where(versions.c.name == draft.name)) or 0
            if number not in (None, own := same.number if same else last + 1):
                told = f"these files are {draft.name}:{own}, or would be, not {draft.name}:{number}"
                raise NumberTaken(told) if number <= last else InvalidRequest(told, "number")
            if same and same.deleted_at:  # whoever pushes wants it here; its bytes are again, even if gc removed them
                self._note(db, same.name, same.number, "restore", draft.created_by, "pushed again")
                return replace(version_of(same), restored=True)
            if same:
                return version_of(same)
            version = replace(draft, number=own, pushed=True)
            db.execute(versions.insert().values(row_of(version)))
            if version.metrics:
                db.execute(metrics.insert(), metric_rows(version))
        return version

    def promote(
        self, ref: Reference, alias: str, who: str, reason: str, require: Sequence[Comparison] = (), *, rule: Unmet
    ) -> AliasMove:
        """Point an alias at what the reference stands for, if that has what is required, and what the rule asks.

        Raises NotFound, RequirementNotMet.
        """
        with self._write() as db:
            target = self._resolve(db, ref)
            unmet = [refusal for one in require if (refusal := one.refusal(target))]
            _hold_to([*unmet, *rule(db, target, alias)], target, alias)
            return self._move(db, target.name, alias, target.number, who, reason, "promote")

    def rollback(self, name: str, alias: str, to: int | None, who: str, reason: str, *, rule: Unmet) -> AliasMove:
        """Point an alias at its previous target, or at version `to`, of which the rule asks nothing if it was there.

        Raises NotFound, NothingToRollBack, RequirementNotMet.
        """
        with self._write() as db:
            moves = self._history(db, name, alias)
            target = previous_target(moves) if to is None else to
            if target is None:
                raise NothingToRollBack(
                    f"{name}@{alias} has no target before {name}:{moves[-1].to_number}; give --to VERSION"
                )
            version = self._resolve(db, Reference(name, version=target))
            if target not in [move.to_number for move in moves]:
                _hold_to(rule(db, version, alias), version, alias)
            return self._move(db, name, alias, target, who, reason, "rollback")

    def remove_alias(
        self, name: str, alias: str, who: str, reason: str, *, protects: Callable[[sa.Connection, str, str], bool]
    ) -> AliasMove:
        """Let an alias point to nothing. Raises UnknownAdapter, UnknownAlias, RequirementNotMet."""
        with self._write() as db:
            if db.scalar(sa.select(aliases.c.number).filter_by(name=name, alias=alias)) is None:
                raise self._not_found(db, Reference(name, alias=alias))
            if protects(db, name, alias):
                raise RequirementNotMet(f"{name}@{alias} is not removed: it is protected; unprotect it first")
            return self._move(db, name, alias, None, who, reason, "remove")

    def tag(self, ref: Reference, add: Collection[str], remove: Collection[str], who: str) -> Version:
        """Put tags on a version and take others off; the ledger gets a row for each that changes. Raises NotFound."""
        with self._write() as db:
            version = self._resolve(db, ref)
            key, at = {"name": version.name, "number": version.number}, datetime.now(UTC).isoformat()
            new, gone = sorted(set(add) - {*version.tags}), sorted({*version.tags} & set(remove) - set(add))
            for tag in gone:
                db.execute(tags.delete().filter_by(**key, tag=tag))
            for tag in new:
                db.execute(tags.insert().values(key | {"tag": tag}))
            for action, changed in (("untag", gone), ("tag", new)):
                for tag in changed:
                    row = key | {"tag": tag, "action": action, "who": who, "at": at}
                    db.execute(tag_changes.insert().values(row))
            return self._resolve(db, Reference(version.name, version=version.number))

    def delete(self, name: str, number: int, who: str, reason: str) -> Deletion:
        """Hide a version, until it is restored. Raises NotFound, VersionInUse."""
        with self._write() as db:
            version = self._resolve(db, Reference(name, version=number))
            if version.aliases:
                pointers = ", ".join(f"{name}@{alias}" for alias in version.aliases)
                raise VersionInUse(f"{version} is not deleted: {pointers} points to it; promote another one first")
            return self._note(db, name, number, "delete", who, reason)

    def restore(self, name: str, number: int, who: str, reason: str) -> Deletion:
        """Show a deleted version again. Raises NotFound, NotDeleted."""
        with self._write() as db:
            row = db.execute(EVERY.where(versions.c.name == name, versions.c.number == number)).first()
            if row is None:
                raise self._not_found(db, Reference(name, version=number))
            if row.deleted_at is None:
                raise NotDeleted(f"{name}:{number} is not deleted")
            if not db.scalar(sa.select(HELD).where(versions.c.name == name, versions.c.number == number)):
                raise self._not_found(db, Reference(name, version=number))
            return self._note(db, name, number, "restore", who, reason)

    def base_ids(self, fingerprint: str) -> set[str]:
        """What versions call the base with a fingerprint."""
        with self._read() as db:
            named = sa.select(versions.c.base_id).where(versions.c.base_fingerprint == fingerprint)
            return set(db.scalars(named.distinct()))

    def held(self) -> set[str]:
        """The digests of all versions that can be read or restored."""
        with self._read() as db:
            return set(db.scalars(sa.select(versions.c.digest).where(HELD)))

    @contextmanager
    def forgetting(
        self, grace_seconds: int, keep: int | None, who: str, dry_run: bool
    ) -> Iterator[tuple[list[Version], list[Version], set[str]]]:
        """Delete what is older than the newest `keep` of its name, and purge what was deleted before the grace.

        Gives the versions deleted, the versions purged, and the digests still held; all becomes true when the block
        ends without an error, unless it is a dry run. What an alias points to stays, and what its rollback leads to.
        """
        with self._write() as db:
            surplus = [] if keep is None else self._surplus(db, keep)
            for version in surplus:
                self._note(db, version.name, version.number, "delete", who, f"gc --keep {keep}")
            before = (datetime.now(UTC) - timedelta(seconds=grace_seconds)).isoformat()
            order = (versions.c.name, versions.c.number)
            gone = EVERY.where(~LIVE, HELD, versions.c.deleted_at <= before).order_by(*order)
            purged = [version_of(row) for row in db.execute(gone).all()]
            for version in purged:
                self._note(db, version.name, version.number, "purge", who, f"deleted {grace_seconds} s ago or earlier")
            yield surplus, purged, set(db.scalars(sa.select(versions.c.digest).where(HELD)))
            if dry_run:
                db.rollback()

    # --- inside a transaction ---

    def _resolve(self, db: sa.Connection, ref: Reference) -> Version:
        row = db.execute(SELECT.where(versions.c.name == ref.name, *_condition(ref)).limit(1)).first()
        if row is None:
            raise self._not_found(db, ref)
        return version_of(row)

    def _history(self, db: sa.Connection, name: str, alias: str) -> list[AliasMove]:
        mine = (alias_moves.c.name == name, alias_moves.c.alias == alias)
        rows = db.execute(sa.select(alias_moves).where(*mine).order_by(alias_moves.c.id)).all()
        if not rows:
            raise self._not_found(db, Reference(name, alias=alias))
        return [alias_move_of(row) for row in rows]

    def _move(
        self, db: sa.Connection, name: str, alias: str, to: int | None, who: str, reason: str, action: str
    ) -> AliasMove:
        key = {"name": name, "alias": alias}
        now = db.scalar(sa.select(aliases.c.number).filter_by(**key))
        if now == to:
            return replace(self._history(db, name, alias)[-1], moved=False)
        if to is None:
            db.execute(aliases.delete().filter_by(**key))
        elif now is None:
            db.execute(aliases.insert().values(key | {"number": to}))
        else:
            db.execute(aliases.update().filter_by(**key).values(number=to))
        move = AliasMove(name, alias, now, to, who, datetime.now(UTC), reason, action)
        row = asdict(move) | {"at": move.at.isoformat()}
        kept = {column: value for column, value in row.items() if column not in ("moved", "id")}
        (key_of_row,) = db.execute(alias_moves.insert().values(kept)).inserted_primary_key or (0,)
        return replace(move, id=key_of_row)

    def _note(self, db: sa.Connection, name: str, number: int, action: str, who: str, reason: str) -> Deletion:
        note = Deletion(name, number, action, who, datetime.now(UTC), reason)
        at = note.at.isoformat()
        db.execute(deletions.insert().values(asdict(note) | {"at": at}))
        if action != "purge":
            now = {"deleted_at": at if action == "delete" else None}
            db.execute(versions.update().filter_by(name=name, number=number).values(now))
        return note

    def _surplus(self, db: sa.Connection, keep: int) -> list[Version]:
        """What a name has beyond its newest `keep` versions, less what its aliases or their rollbacks need."""
        pointers = db.execute(sa.select(aliases.c.name, aliases.c.alias)).all()
        needed = {(name, previous_target(self._history(db, name, alias))) for name, alias in pointers}
        rows = db.execute(SELECT.order_by(versions.c.name, versions.c.number.desc()))
        found: dict[str, list[Version]] = {}
        for row in rows:
            found.setdefault(row.name, []).append(version_of(row))
        older = [version for newest_first in found.values() for version in newest_first[keep:][::-1]]
        return [one for one in older if not one.aliases and (one.name, one.number) not in needed]

    def _deletion(self, db: sa.Connection, name: str, number: int) -> sa.Row[Any]:
        """The row that says who deleted a deleted version."""
        mine = sa.select(deletions).filter_by(name=name, number=number, action="delete")
        return db.execute(mine.order_by(deletions.c.id.desc()).limit(1)).one()

    def _not_found(self, db: sa.Connection, ref: Reference) -> NotFound:
        if ref.version or ref.digest:
            every = sa.select(versions, HELD.label("held"))
            deleted = db.execute(every.where(versions.c.name == ref.name, *_condition(ref))).first()
            if deleted:
                who, version = self._deletion(db, deleted.name, deleted.number).who, f"{deleted.name}:{deleted.number}"
                return DeletedVersion(str(ref), version, who, deleted.deleted_at, purged=not deleted.held)
        names = db.scalars(sa.select(versions.c.name).where(LIVE).distinct()).all()
        if ref.name not in names:
            near = difflib.get_close_matches(ref.name, names, n=1)
            return UnknownAdapter(str(ref), near[0] if near else None)
        if ref.version:
            newest = db.scalar(sa.select(sa.func.max(versions.c.number)).where(versions.c.name == ref.name, LIVE))
            return UnknownVersion(str(ref), f"{ref.name}:{newest}")
        if ref.digest:
            return UnknownDigest(str(ref))
        known = db.scalars(sa.select(aliases.c.alias).where(aliases.c.name == ref.name)).all()
        near = difflib.get_close_matches(ref.alias or "", known, n=1, cutoff=0)  # a name has few: name one of them
        return UnknownAlias(str(ref), f"{ref.name}@{near[0]}" if near else None)


def _condition(ref: Reference) -> tuple[sa.ColumnElement[bool], ...]:
    if ref.version is not None:
        return (versions.c.number == ref.version,)
    if ref.digest is not None:
        return (versions.c.digest == ref.digest,)
    named = (aliases.c.name == ref.name, aliases.c.alias == (ref.alias or PRODUCTION))
    pointed = sa.select(aliases.c.number).where(*named).scalar_subquery()
    if ref.alias is not None:
        return (versions.c.number == pointed,)
    newest = sa.select(sa.func.max(versions.c.number).label("n")).where(versions.c.name == ref.name, LIVE)
    # The inner select must not be correlated with the outer one: it looks at all versions of the name.
    return (versions.c.number == sa.func.coalesce(pointed, newest.correlate(None).scalar_subquery()),)


def _ledger(prefix: str) -> sa.FromClause:
    """The moves of names that begin with a prefix, numbered by their places among these; of all, by their own ids."""
    if not prefix:
        return alias_moves
    number = sa.func.row_number().over(order_by=alias_moves.c.id).label("id")
    told = [column for column in alias_moves.c if column.name != "id"]
    return sa.select(number, *told).where(*begins(alias_moves.c.name, prefix)).subquery()


def _hold_to(unmet: list[str], version: Version, alias: str) -> None:
    if unmet:
        raise RequirementNotMet(f"{version.name}@{alias} does not move to {version}: {'; '.join(unmet)}")
