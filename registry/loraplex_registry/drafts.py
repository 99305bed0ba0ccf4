"""Drafts: the files of a name that were uploaded and are no version yet, changed by commits. Owns their rows.

A name has at most one draft. Its first commit says what it started from; its last is its head. Knows no bytes, and
not what makes an adapter: that is asked when a version is made of it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from .database import Database, Writing
from .errors import InvalidRequest, NoDraft, StaleParent, TooLarge, UnknownAdapter, UnknownFile
from .manifest import FileEntry
from .pages import PAGE, Page, check_limit, page_of, read_cursor, take
from .reference import check_name
from .tables import LONG, METADATA, begins
from .validate import FILES

_COMMIT_CHARACTERS = 40
_files = sa.Table(
    "draft_files",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("path", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("bytes", LONG, nullable=False),
)
_commits = sa.Table(
    "draft_commits",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("commit_id", sa.Text, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Index("draft_commits_by_name", "name", "id"),
)


@dataclass(frozen=True)
class Tree:
    """Files at a commit, by path. `commit` is None where there is nothing yet."""

    commit: str | None = None
    files: tuple[FileEntry, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A name's draft: its head, the files, and what its commits said, oldest first."""

    name: str
    commit: str
    files: tuple[FileEntry, ...]
    messages: tuple[str, ...]


@dataclass(frozen=True)
class OpenDraft:
    """What is told of a draft to those who ask which there are: how many files and bytes, who changed it last, when."""

    name: str
    files: int
    bytes: int
    who: str
    at: datetime


@dataclass(frozen=True)
class Changes:
    """One commit: files to put in, files and folders to take out, who does it and why.

    `parent` is the commit it must follow, or the first digits of it; None follows any. `request` is the sha256 of what
    was sent: the same request again, as after a lost answer, changes nothing. `max_bytes` is for all of the files then.
    """

    added: tuple[FileEntry, ...]
    deleted: tuple[str, ...]
    deleted_folders: tuple[str, ...]
    parent: str | None
    request: str
    who: str
    message: str
    max_bytes: int


Commit = Callable[[str, Changes, Callable[[], Tree]], str]


class Drafts:
    """The drafts in a catalog's database. Every commit is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, name: str) -> Draft | None:
        """The name's draft, or None."""
        with self._database.reading() as db:
            return _find(db, name)

    def page(
        self, name: str | None = None, limit: int = PAGE, cursor: str | None = None, *, prefix: str = ""
    ) -> Page[OpenDraft]:
        """The drafts by name, or a name's own; of names that begin with a prefix.

        Raises InvalidReference, InvalidRequest, NoDraft.
        """
        question = f"drafts of {name or 'all'}"
        after = read_cursor(cursor, question, [str])
        named = [_commits.c.name == check_name(name)] if name is not None else []
        further = [_commits.c.name > after[0]] if after else []
        found = _told(check_limit(limit) + 1, *named, *further, *begins(_commits.c.name, prefix))
        with self._database.reading() as db:
            drafts = [
                OpenDraft(row.name, row.files, int(row.bytes), row.who, datetime.fromisoformat(row.at))
                for row in db.execute(found)
            ]
        if name is not None and not drafts and not cursor:
            raise NoDraft(name)
        return page_of(drafts, limit, question, lambda draft: [draft.name])

    def list(self, name: str | None = None) -> "list[OpenDraft]":
        """All of `page`."""
        return take(lambda size, cursor: self.page(name, size, cursor))

    def held(self) -> set[str]:
        """The sha256 of every file of every draft."""
        with self._database.reading() as db:
            return set(db.scalars(sa.select(_files.c.sha256)))

    def create(self, name: str, who: str) -> bool:
        """Begin an empty draft, unless the name has one: then False."""
        with self._database.writing() as db:
            if _head(db, name):
                return False
            _note(db, name, Changes((), (), (), None, "", who, "", 0), None, ())
            return True

    @contextmanager
    def publishing(self) -> Iterator[Commit]:
        """While this is held, no blob is removed: around putting files in place and committing them.

        Gives the act that changes a name's draft, or begins one from what is published; it answers the head then.
        What leaves every file as it was makes no commit. Raises UnknownAdapter for a name with neither draft nor
        version, StaleParent, UnknownFile for a deletion of what is not there, InvalidRequest when the files do not go
        together, TooLarge.
        """
        with self._database.publishing() as writing:
            yield lambda name, changes, published: self._commit(name, changes, published, writing)

    def _commit(self, name: str, changes: Changes, published: Callable[[], Tree], writing: Writing) -> str:
        with writing() as db:
            draft, last = _find(db, name), _head(db, name)
            if draft and last and changes.request == last.request:
                return draft.commit
            start = published()
            now = Tree(draft.commit, draft.files) if draft else start
            if now.commit is None:
                raise UnknownAdapter(name)
            if changes.parent and not now.commit.startswith(changes.parent):
                raise StaleParent(f"{name} is at commit {now.commit}, not at the parent {changes.parent} of this one")
            files = _changed(name, now, changes, {entry.path for entry in start.files})
            if files == {entry.path: entry for entry in now.files}:
                return now.commit
            kept = tuple(files[path] for path in sorted(files))
            db.execute(_files.delete().filter_by(name=name))
            if kept:
                rows = [{"name": name, "path": one.path, "sha256": one.sha256, "bytes": one.bytes} for one in kept]
                db.execute(_files.insert(), rows)
            return _note(db, name, changes, now.commit, kept)

    def drop(self, name: str, commit: str | None = None) -> bool:
        """Forget the draft; with a commit, only if that is its head still."""
        with self._database.writing() as db:
            last = _head(db, name)
            if last is None or commit not in (None, last.commit_id):
                return False
            for table in (_files, _commits):
                db.execute(table.delete().filter_by(name=name))
            return True


def _changed(name: str, now: Tree, changes: Changes, known: Iterable[str]) -> dict[str, FileEntry]:
    """The files after the changes. Deleting what main has, as it is read, is no error where the draft lost it."""
    files = {entry.path: entry for entry in now.files}
    known = set(known)
    for path in changes.deleted:
        if files.pop(path, None) is None and path not in known:
            raise UnknownFile(f"{name}/{path}")
    for folder in changes.deleted_folders:
        below = [path for path in files if path.startswith(f"{folder}/")]
        if not below and not any(path.startswith(f"{folder}/") for path in known):
            raise UnknownFile(f"{name}/{folder}/")
        for path in below:
            del files[path]
    files |= {entry.path: entry for entry in changes.added}
    folders = {path[:at] for path in files for at, letter in enumerate(path) if letter == "/"}
    if both := sorted(folders & files.keys()):
        raise InvalidRequest(f"{both[0]!r} would be a file and a folder", "path")
    if len(files) > FILES:
        raise InvalidRequest(f"{len(files)} files, at most {FILES} are taken", "path")
    total_bytes = sum(entry.bytes for entry in files.values())
    if total_bytes > changes.max_bytes:
        raise TooLarge(f"{name} would have {total_bytes:,} bytes, at most {changes.max_bytes:,} are taken")
    return files


def _told(limit: int, *holds: sa.ColumnElement[bool]) -> sa.Select:
    """The first drafts by name for which something holds: their last commits, and what their files come to."""
    last = sa.select(_commits.c.name, sa.func.max(_commits.c.id).label("id")).where(*holds).group_by(_commits.c.name)
    last = last.order_by(_commits.c.name).limit(limit).subquery()
    own = _files.c.name == last.c.name
    count = sa.select(sa.func.count()).where(own).scalar_subquery()
    total = sa.select(sa.func.coalesce(sa.func.sum(_files.c.bytes), 0)).where(own).scalar_subquery()
    told = sa.select(_commits.c.name, _commits.c.who, _commits.c.at, count.label("files"), total.label("bytes"))
    return told.join(last, _commits.c.id == last.c.id).order_by(_commits.c.name)


def _find(db: sa.Connection, name: str) -> Draft | None:
    commits = db.execute(sa.select(_commits).filter_by(name=name).order_by(_commits.c.id)).all()
    if not commits:
        return None
    rows = db.execute(sa.select(_files).filter_by(name=name).order_by(_files.c.path))
    files = tuple(FileEntry(row.path, row.sha256, row.bytes) for row in rows)
    return Draft(name, commits[-1].commit_id, files, tuple(row.message for row in commits if row.message))


def _head(db: sa.Connection, name: str) -> sa.Row | None:
    return db.execute(sa.select(_commits).filter_by(name=name).order_by(_commits.c.id.desc()).limit(1)).first()


def _note(db: sa.Connection, name: str, changes: Changes, parent: str | None, files: tuple[FileEntry, ...]) -> str:
    """Append the commit; its id is made of its files and of its parent."""
    said = json.dumps([parent, [[entry.path, entry.sha256] for entry in files]], ensure_ascii=False)
    commit = hashlib.sha256(said.encode()).hexdigest()[:_COMMIT_CHARACTERS]
    row = {"name": name, "commit_id": commit, "parent": parent, "request": changes.request, "who": changes.who}
    db.execute(_commits.insert().values(row | {"at": datetime.now(UTC).isoformat(), "message": changes.message}))
    return commit
