"""The rows of signatures: who signed which version, when, with which key. Takes none that does not hold.

Knows no private keys: they stay with those who sign.
"""

from collections.abc import Callable
from datetime import datetime

import sqlalchemy as sa

from . import acts
from .catalog import Catalog
from .errors import InvalidKey, UnknownDigest
from .reference import check_digest
from .schema import METADATA
from .signing import PublicKey, Signature, holds

_signatures = sa.Table(
    "signatures",
    METADATA,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("signature", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
)


class Signatures:
    """The signatures of one catalog's versions."""

    def __init__(self, catalog: Catalog, whoami: Callable[[], str]) -> None:
        self._catalog, self._whoami = catalog, whoami

    def add(self, digest: str, key: str, signature: str, *, who: str | None = None) -> Signature:
        """Keep a key's signature of a version; one that is there already stays as it is.

        Raises InvalidReference, InvalidKey when it does not hold, UnknownDigest, SigningUnavailable.
        """
        public = PublicKey.parse(key)
        if not holds(check_digest(digest), key, signature):
            raise InvalidKey(f"the signature is not {public.id}'s of {digest}")
        named = self._catalog.named(digest)
        if not named:
            raise UnknownDigest(digest)
        row = {"digest": digest, "key": key, "signature": signature, "who": who or self._whoami()}
        with self._catalog.writing() as db:
            mine = sa.select(_signatures).where(_signatures.c.digest == digest, _signatures.c.key == key)
            found = db.execute(mine).first()
            if found is None or found.signature != signature:  # one that was spoilt is mended
                at = [acts.note(db, name, "sign", f"{name}:{number}", row["who"], public.id) for name, number in named]
                db.execute(_signatures.delete().where(_signatures.c.digest == digest, _signatures.c.key == key))
                db.execute(_signatures.insert().values(row | {"at": at[0].isoformat()}))
                found = db.execute(mine).one()
        return _signature(found)

    def of(self, digest: str) -> list[Signature]:
        """The version's signatures, the oldest first. Raises InvalidReference."""
        with self._catalog.reading() as db:
            return self.within(db, check_digest(digest))

    def within(self, db: sa.Connection, digest: str) -> list[Signature]:
        """The same, inside a transaction."""
        mine = sa.select(_signatures).where(_signatures.c.digest == digest)
        return [_signature(row) for row in db.execute(mine.order_by(_signatures.c.at, _signatures.c.key))]


def _signature(row: sa.Row) -> Signature:
    return Signature(row.digest, row.key, row.signature, row.who, datetime.fromisoformat(row.at))
