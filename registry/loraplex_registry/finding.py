"""Questions that have long answers: what there is, what matches, what was done. Each is answered a page at a time.

Every page is found through an index, from the row that the one before ended with: a page costs the same wherever it is.
Owns how terms and sort keys become SQL, the same for every database. Changes nothing.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from .acts import acts
from .errors import InvalidQuery
from .pages import PAGE_LIMIT, Listing, Page, check_limit, page_of, read_cursor
from .query import NUMBERS, SIGNS, Comparison, Field, parse_query, parse_sort
from .tables import (
    EVERY,
    LIVE,
    SELECT,
    alias_moves,
    aliases,
    begins,
    dataset_text,
    deletions,
    metrics,
    tag_changes,
    tags,
    version_of,
    versions,
)
from .version import Act, Version

_COLUMNS: dict[str, sa.ColumnElement[Any]] = {  # what can be sorted by beside metrics; no version is without
    "name": versions.c.name,
    "created": versions.c.created_at,
    "base": versions.c.base_id,
    "by": versions.c.created_by,
    "rank": versions.c.rank,
    "bytes": versions.c.bytes,
    "version": versions.c.number,
}
_TOLD: dict[str, sa.ColumnElement[Any]] = {  # the same of what a receipt or a card may tell; empty where it does not
    "description": versions.c.description,
    "dataset": versions.c.dataset,
    "run": versions.c.run,
}
FEW = 2000  # versions that a comparison holds for: up to there they are looked at one by one
Place = tuple[str, int, str, int]  # of an act: when, in which ledger, whose, and which of these it is, from the newest


class Finder:
    """Asks one catalog. ``read`` gives a connection. ``prefix`` is what names begin with that may be seen."""

    def __init__(self, read: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        self._read = read

    def newest(self, limit: int, cursor: str | None = None, prefix: str = "") -> Listing:
        """The newest version of each name, by name, and the aliases of those names. Raises InvalidRequest."""
        after = read_cursor(cursor, "list", [str])
        newer = versions.alias("newer")
        has_newer = sa.select(newer.c.name).where(
            newer.c.name == versions.c.name, newer.c.number > versions.c.number, newer.c.deleted_at.is_(None)
        )
        found = SELECT.where(~has_newer.exists(), *begins(versions.c.name, prefix))
        if after:
            found = found.where(versions.c.name > after[0])
        with self._read() as db:
            rows = db.execute(found.order_by(versions.c.name).limit(check_limit(limit) + 1)).all()
            page = page_of([*map(version_of, rows)], limit, "list", lambda version: [version.name])
            names = [version.name for version in page.data]
            return Listing(page.data, page.next, self._aliases(db, names[0], names[-1]) if names else {})

    def versions(self, name: str, limit: int, cursor: str | None = None) -> Page[Version]:
        """The versions of a name, oldest first; none when there is no such name. Raises InvalidRequest."""
        question = f"versions of {name}"
        after = read_cursor(cursor, question, [int])
        found = SELECT.where(versions.c.name == name, versions.c.number > (after[0] if after else 0))
        with self._read() as db:
            rows = db.execute(found.order_by(versions.c.number).limit(check_limit(limit) + 1)).all()
        return page_of([*map(version_of, rows)], limit, question, lambda version: [version.number])

    def search(self, query: str, sort: str, limit: int, cursor: str | None = None, prefix: str = "") -> Page[Version]:
        """The versions for which all terms hold, sorted by a key; those that lack it come last.

        Raises InvalidQuery, InvalidRequest.
        """
        if not 1 <= limit <= PAGE_LIMIT:
            raise InvalidQuery(f"limit is {limit}, expected 1 to {PAGE_LIMIT:,}")
        terms, (key, highest) = parse_query(query), parse_sort(sort)
        question = f"search by {sort}"
        after = read_cursor(cursor, question, [str | int | float | None, str, int])  # type: ignore[list-item]
        with self._read() as db:
            holds = [LIVE, *begins(versions.c.name, prefix)]
            if key in _COLUMNS:
                holds += [_holds(db, term) for term in terms]
                found = _sorted(db, sa.select(versions.c.name), holds, _COLUMNS[key], highest, after, limit + 1)
            elif key in _TOLD:
                holds += [_holds(db, term) for term in terms]
                told, every = _TOLD[key], sa.select(versions.c.name)
                has, lacks = every.where(told != ""), every.where(told == "")
                found = _sorted_lacking_last(db, has, lacks, holds, told, highest, after, limit + 1)
            else:
                found = _sorted_by_metric(db, holds, terms, key, highest, after, limit + 1)
        return page_of(found, limit, question, lambda version: [_value(version, key), version.name, version.number])

    def audit(self, name: str | None, limit: int, cursor: str | None = None, prefix: str = "") -> Page[Act]:
        """What was done to a name, or to all, newest first; none when there is no such name. Raises InvalidRequest."""
        question = f"audit of {name or 'all'}"
        after = read_cursor(cursor, question, [str, int, str, int])
        wanted = check_limit(limit) + 1
        with self._read() as db:
            ledgers = [
                [*_acts(db, number, ledger, name, prefix, after, wanted)] for number, ledger in enumerate(_ledgers())
            ]
        newest = heapq.merge(*ledgers, key=lambda row: row[0][:2], reverse=True)
        found = [row for row, _ in zip(newest, range(wanted), strict=False)]
        page = page_of(found, limit, question, lambda row: row[0])
        return Page([act for _, act in page.data], page.next)

    def _aliases(self, db: sa.Connection, first: str, last: str) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        between = sa.select(aliases).where(aliases.c.name >= first, aliases.c.name <= last)
        for row in db.execute(between.order_by(aliases.c.name, aliases.c.alias)):
            found.setdefault(row.name, {})[row.alias] = row.number
        return found


# --- search ---


def _sorted(
    db: sa.Connection,
    chosen: sa.Select,
    holds: list[sa.ColumnElement[bool]],
    column: sa.ColumnElement[Any],
    highest: bool,
    after: list | None,
    limit: int,
) -> list[Version]:
    """Versions by a column that all of them have, equal ones by name and the newest number first."""
    name, number = versions.c.name, versions.c.number
    order = (column.desc() if highest else column.asc(), name, number.desc())
    keys = chosen.with_only_columns(name, number, column.label("value")).where(*holds)
    if after:
        value, last_name, last_number = after
        further = column < value if highest else column > value
        later = sa.or_(name > last_name, sa.and_(name == last_name, number < last_number))
        reached = column <= value if highest else column >= value  # implied by the next; it is what an index can use
        keys = keys.where(reached, sa.or_(further, sa.and_(column == value, later)))
    # The keys first and then their rows: what is not shown is not read whole.
    found = keys.order_by(*order).limit(limit).subquery()
    whole = EVERY.join(found, sa.and_(found.c.name == name, found.c.number == number))
    values = found.c.value.desc() if highest else found.c.value.asc()
    return [*map(version_of, db.execute(whole.order_by(values, found.c.name, found.c.number.desc())))]


def _sorted_by_metric(
    db: sa.Connection,
    holds: list[sa.ColumnElement[bool]],
    terms: Sequence[Comparison | Field],
    key: str,
    highest: bool,
    after: list | None,
    limit: int,
) -> list[Version]:
    """By a metric's value; where a term is about it, only those that have it."""
    own = sa.and_(metrics.c.name == versions.c.name, metrics.c.number == versions.c.number, metrics.c.key == key)
    bounds = [term for term in terms if isinstance(term, Comparison) and term.key == key]
    holds = holds + [_holds(db, term) for term in terms if term not in bounds]
    has = sa.select(versions.c.name).join(metrics, own)
    has = has.where(*(SIGNS[term.sign](metrics.c.value, term.number) for term in bounds))
    lacks = None if bounds else sa.select(versions.c.name).where(~sa.select(metrics.c.name).where(own).exists())
    return _sorted_lacking_last(db, has, lacks, holds, metrics.c.value, highest, after, limit)


def _sorted_lacking_last(
    db: sa.Connection,
    has: sa.Select,
    lacks: sa.Select | None,
    holds: list[sa.ColumnElement[bool]],
    column: sa.ColumnElement[Any],
    highest: bool,
    after: list | None,
    limit: int,
) -> list[Version]:
    """First those that have a value, by it; then those that lack it, which nothing sorts."""
    found: list[Version] = []
    if not after or after[0] is not None:
        found = _sorted(db, has, holds, column, highest, after, limit)
        after = None
    if len(found) < limit and lacks is not None:
        place = after and [0, *after[1:]]
        found += _sorted(db, lacks, holds, sa.literal(0), False, place, limit - len(found))
    return found


def _value(version: Version, key: str) -> str | float | None:
    """What a version is sorted by, as the database has it."""
    if key in NUMBERS:
        return Comparison(key, "=", 0).of(version)
    words = {"name": version.name, "base": version.base.id, "by": version.created_by}
    told = {"description": version.description, "dataset": dataset_text(version.lineage), "run": version.lineage.run}
    if key in told:
        return told[key] or None
    return words.get(key, version.created_at.isoformat() if key == "created" else version.metrics.get(key))


def _holds(db: sa.Connection, term: Comparison | Field) -> sa.ColumnElement[bool]:
    if isinstance(term, Comparison):
        return _compares(db, term)
    text = term.text
    match term.field:
        case None:
            places = (versions.c.name, versions.c.message, versions.c.description)
            return sa.or_(*(place.icontains(text, autoescape=True) for place in places))
        case "alias":
            named = sa.select(aliases.c.number).where(
                aliases.c.name == versions.c.name, aliases.c.number == versions.c.number, aliases.c.alias == text
            )
            return named.exists()
        case "tag":
            tagged = sa.select(tags.c.name, tags.c.number).where(tags.c.tag == text)
            return sa.tuple_(versions.c.name, versions.c.number).in_(tagged)
        case "target":
            return sa.cast(versions.c.targets, sa.Text).contains(f'"{text}"', autoescape=True)
        case "digest" | "parent":
            digest = versions.c.digest if term.field == "digest" else versions.c.parent
            return digest.startswith("sha256:" + text.removeprefix("sha256:"), autoescape=True)
    column = versions.c[{"base": "base_id", "by": "created_by"}.get(term.field, term.field)]
    return column.icontains(text, autoescape=True)


def _compares(db: sa.Connection, term: Comparison) -> sa.ColumnElement[bool]:
    if term.key in NUMBERS:
        return SIGNS[term.sign](_COLUMNS[term.key], term.number)
    having = sa.select(metrics.c.name, metrics.c.number).where(
        metrics.c.key == term.key, SIGNS[term.sign](metrics.c.value, term.number)
    )
    some = having.limit(FEW).subquery()
    if (db.scalar(sa.select(sa.func.count()).select_from(some)) or 0) < FEW:
        return sa.tuple_(versions.c.name, versions.c.number).in_(having)  # begin with those that have it
    return having.where(  # begin with what is sorted: those that have it are never far
        metrics.c.name == versions.c.name, metrics.c.number == versions.c.number
    ).exists()


# --- audit ---


def _ledgers() -> list[sa.Select]:
    """What is told, of each table that keeps acts: the act, whose it is, and its row's number there."""
    version = versions.c.name + ":" + _text(versions.c.number)
    pushes = sa.select(
        versions.c.created_at.label("at"),
        versions.c.created_by.label("who"),
        sa.literal("push").label("action"),
        version.label("subject"),
        versions.c.message.label("reason"),
        versions.c.name.label("name"),
        versions.c.number.label("row"),
    )
    moved, gone = alias_moves.c, deletions.c
    came_from = sa.func.coalesce(_text(moved.from_number) + " → ", "")
    way = moved.name + "@" + moved.alias + ": " + came_from + sa.func.coalesce(_text(moved.to_number), "nothing")
    moves = sa.select(
        moved.at, moved.who, moved.action, way.label("subject"), moved.reason, moved.name, moved.id.label("row")
    )
    hidden = (gone.name + ":" + _text(gone.number)).label("subject")
    deleted = sa.select(gone.at, gone.who, gone.action, hidden, gone.reason, gone.name, gone.id.label("row"))
    changed = tag_changes.c
    what = (changed.name + ":" + _text(changed.number) + " " + changed.tag).label("subject")
    tagged = sa.select(
        changed.at,
        changed.who,
        changed.action,
        what,
        sa.literal("").label("reason"),
        changed.name,
        changed.id.label("row"),
    )
    other = acts.c
    whose = sa.func.coalesce(other.name, "").label("name")
    rest = sa.select(other.at, other.who, other.action, other.subject, other.reason, whose, other.id.label("row"))
    return [pushes, moves, deleted, tagged, rest]


def _acts(
    db: sa.Connection,
    ledger: int,
    told: sa.Select,
    name: str | None,
    prefix: str,
    after: list | None,
    limit: int,
) -> Iterator[tuple[Place, Act]]:
    """A ledger's newest acts, of those after a place, with the place of each.

    No place holds a row's number, which would tell who sees some names how much was done to others.
    """
    at, own, row = (told.selected_columns[key] for key in ("at", "name", "row"))
    if name:
        told = told.where(own == name)
    told = told.where(*begins(own, prefix))
    moment, count = None, 0  # when and whose the last act was, and which of these
    if after:
        last_at, last_ledger, last_name, last_count = after
        same = own <= last_name if ledger == last_ledger else sa.literal(ledger < last_ledger)
        told = told.where(at <= last_at, sa.or_(at < last_at, sa.and_(at == last_at, same)))
        if ledger == last_ledger:
            moment, count = (last_at, last_name), last_count
    for found in db.execute(told.order_by(at.desc(), own.desc(), row.desc()).limit(limit).offset(count)):
        count = count + 1 if moment == (found.at, found.name) else 1
        moment = found.at, found.name
        act = Act(datetime.fromisoformat(found.at), found.who, found.action, found.subject, found.reason)
        yield (found.at, ledger, found.name, count), act


def _text(column: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    return sa.cast(column, sa.Text)
