"""Tokens: who may do what, and to which names. Owns the rules of scopes and prefixes, and the rows.

Of a secret only its sha256 is kept. It has 256 random bits, so nobody finds it by trying, and a slow hash, which
protects what people choose, would add nothing but its cost to every request. A row stays when its token is revoked: a
registry that once had a token never opens to everybody again. Knows no HTTP.
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from . import acts
from .catalog import Catalog
from .errors import InvalidRequest, NotFound, UnknownToken
from .schema import METADATA

READ, PUSH, PROMOTE, ADMIN = "read", "push", "promote", "admin"
INCLUDES = {READ: {READ}, PUSH: {READ, PUSH}, PROMOTE: {READ, PROMOTE}, ADMIN: {READ, PUSH, PROMOTE, ADMIN}}
MARK = "lpx_"  # what a secret begins with, so that people and scanners know one when they see it
MAX_SECONDS = 3650 * 24 * 3600
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,94}[A-Za-z0-9])?")
_PREFIX = re.compile(r"(?:[a-z0-9][a-z0-9._-]{0,95}(?:/[a-z0-9._-]{0,95})?)?")

_tokens = sa.Table(
    "tokens",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Text),
    sa.Column("revoked_at", sa.Text),
)


@dataclass(frozen=True)
class Identity:
    """Who asks, and what they may. `prefix` is what the names they see and touch begin with; '' is every name."""

    name: str
    scopes: tuple[str, ...]
    prefix: str = ""
    expires_at: datetime | None = None

    def may(self, scope: str) -> bool:
        return any(scope in INCLUDES[own] for own in self.scopes)


@dataclass(frozen=True)
class Token:
    """A token as it is listed. `id` is the beginning of its secret's sha256, and tells nothing of the secret."""

    id: str
    name: str
    scopes: tuple[str, ...]
    prefix: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None

    @property
    def state(self) -> str:
        """live, revoked or expired."""
        expired = self.expires_at is not None and self.expires_at <= datetime.now(UTC)
        return "revoked" if self.revoked_at else "expired" if expired else "live"

    @property
    def identity(self) -> Identity:
        return Identity(self.name, self.scopes, self.prefix, self.expires_at)

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"


@dataclass(frozen=True)
class NewToken:
    """A token and its secret, which is told here and never again."""

    token: Token
    secret: str = field(repr=False)


class Tokens:
    """The tokens of one catalog."""

    def __init__(self, catalog: Catalog, whoami: Callable[[], str]) -> None:
        self._catalog, self._whoami = catalog, whoami
        self._had_one = False

    def create(
        self,
        name: str,
        scopes: Sequence[str],
        prefix: str = "",
        expires_seconds: int | None = None,
        *,
        who: str | None = None,
    ) -> NewToken:
        """Make a token; without `expires_seconds` it never ends. Raises InvalidRequest."""
        check_token(name, scopes, prefix, expires_seconds)
        secret = MARK + secrets.token_urlsafe(32)
        digest, now = _sha256(secret), datetime.now(UTC)
        expires_at = now + timedelta(seconds=expires_seconds) if expires_seconds else None
        ordered = tuple(scope for scope in INCLUDES if scope in scopes)
        token = Token(digest[:12], name, ordered, prefix, now, who or self._whoami(), expires_at, None)
        row = {
            "id": token.id,
            "sha256": digest,
            "name": name,
            "scopes": list(ordered),
            "prefix": prefix,
            "created_at": now.isoformat(),
            "created_by": token.created_by,
            "expires_at": expires_at and expires_at.isoformat(),
        }
        allows = ", ".join(ordered) + (f" of {prefix}…" if prefix else "")
        with self._catalog.writing() as db:
            db.execute(_tokens.insert().values(row))
            acts.note(db, None, "token create", str(token), token.created_by, allows)
        return NewToken(token, secret)

    def list(self) -> "list[Token]":
        """All that ever were, the oldest first."""
        with self._catalog.reading() as db:
            return [_token(row) for row in db.execute(sa.select(_tokens).order_by(_tokens.c.created_at))]

    def revoke(self, token_id: str, *, who: str | None = None) -> Token:
        """From now on it opens nothing; what was revoked already stays so. Raises UnknownToken."""
        mine = sa.select(_tokens).where(_tokens.c.id == token_id)
        with self._catalog.writing() as db:
            row = db.execute(mine).first()
            if row is None:
                raise UnknownToken(token_id)
            if row.revoked_at is None:
                at = acts.note(db, None, "token revoke", str(_token(row)), who or self._whoami())
                db.execute(_tokens.update().where(_tokens.c.id == token_id).values(revoked_at=at.isoformat()))
            return _token(db.execute(mine).one())

    def find(self, secret: str) -> Token | None:
        """The live token with this secret."""
        with self._catalog.reading() as db:
            row = db.execute(sa.select(_tokens).where(_tokens.c.sha256 == _sha256(secret))).first()
        token = _token(row) if row else None
        return token if token and token.state == "live" else None

    def any(self) -> bool:
        """Whether there is one, or ever was."""
        if not self._had_one:
            with self._catalog.reading() as db:
                self._had_one = db.execute(sa.select(_tokens.c.id).limit(1)).first() is not None
        return self._had_one


def check_token(name: str, scopes: Sequence[str], prefix: str, expires_seconds: int | None) -> None:
    """Raises InvalidRequest that names what a token cannot have."""
    if not _NAME.fullmatch(name):
        told = f"name is {name!r}, expected letters, digits and . _ - @ inside, 96 at most"
        raise InvalidRequest(told, "name")
    if not scopes:
        raise InvalidRequest(f"scopes is empty, expected one or more of {', '.join(INCLUDES)}", "scopes")
    if wrong := next((scope for scope in scopes if scope not in INCLUDES), None):
        raise InvalidRequest(f"scopes holds {wrong!r}, expected {', '.join(INCLUDES)}", "scopes")
    if not _PREFIX.fullmatch(prefix):
        raise InvalidRequest(f"prefix is {prefix!r}, expected what a name can begin with, as 'quotes-'", "prefix")
    if expires_seconds is not None and not 1 <= expires_seconds <= MAX_SECONDS:
        told = f"expires_seconds is {expires_seconds}, expected 1 to {MAX_SECONDS:,}, which is ten years"
        raise InvalidRequest(told, "expires_seconds")


@contextmanager
def silent_of_others(prefix: str) -> Iterator[None]:
    """An error names the nearest that there is: not one that does not begin with the prefix."""
    try:
        yield
    except NotFound as error:
        if error.nearest is None or error.nearest.startswith(prefix):
            raise
        raise type(error)(error.ref) from None


def _token(row: sa.Row[Any]) -> Token:
    times = {key: value and datetime.fromisoformat(value) for key, value in row._mapping.items() if key.endswith("_at")}
    return Token(row.id, row.name, tuple(row.scopes), row.prefix, created_by=row.created_by, **times)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
