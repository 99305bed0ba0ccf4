"""Rules that protect aliases: what a version must have before one moves to it, and who approved which.

Owns the rows and says what of a rule is not met; the catalog asks within the transaction that moves the alias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from . import acts
from .catalog import Catalog
from .errors import InvalidRequest, NotApprovable, NotProtected, NotSigned
from .query import Comparison
from .reference import Reference, check_alias, check_name
from .schema import METADATA
from .signatures import Signatures
from .signing import PublicKey, check_signed
from .version import Version

APPROVER_CHARACTERS = 96
MOST = 50  # of each kind in a rule

_protections = sa.Table(
    "protections",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("require", sa.JSON, nullable=False),
    sa.Column("signed_by", sa.JSON, nullable=False),
    sa.Column("approvers", sa.JSON, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
)
_approvals = sa.Table(
    "approvals",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("alias", sa.Text, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.UniqueConstraint("name", "number", "alias", "who"),
)


@dataclass(frozen=True)
class Rule:
    """What `name@alias` asks of a version: all comparisons, a signature by one of the keys, one approver's yes."""

    name: str
    alias: str
    require: tuple[str, ...]
    signed_by: tuple[str, ...]  # public keys, as base64
    approvers: tuple[str, ...]
    who: str
    at: datetime

    def __str__(self) -> str:
        keys = [PublicKey(key).id for key in self.signed_by]
        parts = [", ".join(self.require)]
        parts += [f"signed by {' or '.join(keys)}"] if keys else []
        parts += [f"approved by {' or '.join(self.approvers)}"] if self.approvers else []
        return "; ".join(filter(None, parts))


@dataclass(frozen=True)
class Approval:
    """Somebody's yes to a version under an alias."""

    name: str
    number: int
    alias: str
    who: str
    at: datetime

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


class Protections:
    """The rules and approvals of one catalog."""

    def __init__(self, catalog: Catalog, signatures: Signatures, whoami: Callable[[], str]) -> None:
        self._catalog, self._signatures, self._whoami = catalog, signatures, whoami

    def protect(
        self,
        name: str,
        alias: str,
        require: Sequence[str] = (),
        signed_by: Sequence[str] = (),
        approvers: Sequence[str] = (),
        *,
        who: str | None = None,
    ) -> Rule:
        """Ask this of whatever the alias is promoted to from now on, in place of the rule before.

        Raises InvalidReference, InvalidQuery, InvalidKey, InvalidRequest, UnknownAdapter.
        """
        check_name(name)
        check_alias(alias)
        comparisons = tuple(one.strip() for one in require if Comparison.parse(one))  # in all their digits
        keys = tuple(PublicKey.parse(one).text for one in signed_by)
        for one in approvers:
            if not one.strip() or not one.isprintable() or len(one) > APPROVER_CHARACTERS:
                told = f"approvers holds {one[:100]!r}, expected who approves, {APPROVER_CHARACTERS} characters at most"
                raise InvalidRequest(told, "approvers")
        if not (comparisons or keys or approvers):
            raise InvalidRequest("the rule is empty, expected a comparison, a key or an approver")
        if max(map(len, (comparisons, keys, approvers))) > MOST:
            raise InvalidRequest(f"the rule has more than {MOST} comparisons, keys or approvers")
        self._catalog.versions(name)  # a mistyped name would protect nothing
        who = who or self._whoami()
        row: dict[str, Any] = {"require": list(comparisons), "signed_by": list(keys), "approvers": list(approvers)}
        row |= {"name": name, "alias": alias, "who": who}
        with self._catalog.writing() as db:
            text = str(Rule(name, alias, comparisons, keys, tuple(approvers), who, datetime.min))
            at = acts.note(db, name, "protect", f"{name}@{alias}", who, text)
            db.execute(_protections.delete().filter_by(name=name, alias=alias))
            db.execute(_protections.insert().values(row | {"at": at.isoformat()}))
        return Rule(name, alias, comparisons, keys, tuple(approvers), who, at)

    def unprotect(self, name: str, alias: str, *, who: str | None = None) -> Rule:
        """Take the rule away, and return it. Raises InvalidReference, NotProtected."""
        check_name(name)
        check_alias(alias)
        with self._catalog.writing() as db:
            rule = self._rule(db, name, alias)
            if rule is None:
                raise NotProtected(f"{name}@{alias} has no rule")
            acts.note(db, name, "unprotect", f"{name}@{alias}", who or self._whoami(), str(rule))
            db.execute(_protections.delete().filter_by(name=name, alias=alias))
        return rule

    def list(self) -> "list[Rule]":
        """All rules, by name and alias."""
        with self._catalog.reading() as db:
            rows = db.execute(sa.select(_protections).order_by(_protections.c.name, _protections.c.alias))
            return [_as_rule(row) for row in rows]

    def approve(self, ref: str | Reference, alias: str, *, who: str | None = None) -> Approval:
        """Say yes to a version under an alias; again is nothing new. Who pushed a version cannot.

        Raises InvalidReference, NotFound, NotApprovable.
        """
        check_alias(alias)
        who = who or self._whoami()
        version = self._catalog.resolve(ref if isinstance(ref, Reference) else Reference.parse(ref))
        if version.created_by == who:
            raise NotApprovable(f"{version} was pushed by {who}: somebody else has to approve it")
        row = {"name": version.name, "number": version.number, "alias": alias, "who": who}
        with self._catalog.writing() as db:
            found = db.execute(sa.select(_approvals).filter_by(**row)).first()
            if found:
                return Approval(**row, at=datetime.fromisoformat(found.at))
            at = acts.note(db, version.name, "approve", str(version), who, f"for {alias}")
            db.execute(_approvals.insert().values(row | {"at": at.isoformat()}))
        return Approval(**row, at=at)

    def approvals(self, ref: str | Reference) -> "list[Approval]":
        """Who said yes to a version, under which alias, the first first. Raises InvalidReference, NotFound."""
        version = self._catalog.resolve(ref if isinstance(ref, Reference) else Reference.parse(ref))
        mine = sa.select(_approvals).filter_by(name=version.name, number=version.number).order_by(_approvals.c.id)
        with self._catalog.reading() as db:
            return [
                Approval(row.name, row.number, row.alias, row.who, datetime.fromisoformat(row.at))
                for row in db.execute(mine)
            ]

    def unmet(self, db: sa.Connection, version: Version, alias: str) -> "list[str]":
        """What the alias's rule asks and the version does not have, inside a transaction; nothing without a rule."""
        rule = self._rule(db, version.name, alias)
        if rule is None:
            return []
        found = [refusal for one in rule.require if (refusal := Comparison.parse(one).refusal(version))]
        if rule.signed_by:
            try:
                signatures = self._signatures.within(db, version.digest)
                check_signed("it", version.digest, signatures, map(PublicKey, rule.signed_by))
            except NotSigned as error:
                found.append(str(error))
        if rule.approvers:
            given = db.scalars(
                sa.select(_approvals.c.who).filter_by(name=version.name, number=version.number, alias=alias)
            ).all()
            if not set(given) & set(rule.approvers):
                has = f"one by {', '.join(given)}" if given else "none"
                found.append(f"an approval by {' or '.join(rule.approvers)} is required, and it has {has}")
        return found

    def protects(self, db: sa.Connection, name: str, alias: str) -> bool:
        """Whether the alias has a rule, inside a transaction."""
        return self._rule(db, name, alias) is not None

    def _rule(self, db: sa.Connection, name: str, alias: str) -> Rule | None:
        row = db.execute(sa.select(_protections).filter_by(name=name, alias=alias)).first()
        return _as_rule(row) if row else None


def _as_rule(row: sa.Row) -> Rule:
    lists = (tuple(row.require), tuple(row.signed_by), tuple(row.approvers))
    return Rule(row.name, row.alias, *lists, row.who, datetime.fromisoformat(row.at))
