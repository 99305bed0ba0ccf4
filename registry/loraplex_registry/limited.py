"""The registry as the holder of a token with a name prefix sees it: other names are not there, nor can be touched.

Reading answers as if other names did not exist; writing says which names the token is for, whatever there is. So
neither tells of other names. Verbs that concern all names are refused, and what is not written here cannot be done.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from .base import BaseDescription
from .blobs import BlobStore
from .drafts import Changes, Commit, Draft, Drafts, OpenDraft, Tree
from .errors import CorruptBlob, Forbidden, InvalidManifest, UnknownAdapter, UnknownDigest
from .garbage import Marks
from .manifest import FileEntry, Manifest
from .pages import PAGE, Listing, Page, take
from .protections import Approval, Protections, Rule
from .reference import Reference, check_digest, check_name, parse_alias, parse_version
from .registry import AUDIT_LIMIT, MANIFEST, SEARCH_LIMIT, Registry
from .signatures import Signatures
from .signing import Signature
from .tokens import Identity, Tokens, silent_of_others
from .trusted_bases import TrustedBases
from .validate import Limits
from .version import Act, AliasMove, Collected, Deletion, Fault, Version


class LimitedRegistry:
    """Some of a registry's names. Its methods are Registry's, and raise what those raise, and Forbidden."""

    def __init__(self, registry: Registry, identity: Identity, marks: Marks) -> None:
        """`marks` knows the blobs of manifests, and is kept between requests."""
        self._registry, self._identity, self._marks = registry, identity, marks
        self.prefix = identity.prefix

    @property
    def root(self) -> Path:
        return self._registry.root

    @property
    def store(self) -> BlobStore:
        """All blobs: whoever reads one by a digest that a caller named asks `has_blob` first."""
        return self._registry.store

    @property
    def limits(self) -> Limits:
        return self._registry.limits

    @property
    def drafts(self) -> "LimitedDrafts":
        return LimitedDrafts(self._registry.drafts, self)

    @property
    def tokens(self) -> Tokens:
        raise self._all_names("to care for tokens")

    @property
    def signatures(self) -> "LimitedSignatures":
        return LimitedSignatures(self._registry.signatures, self._digests())

    @property
    def protections(self) -> "LimitedProtections":
        return LimitedProtections(self._registry.protections, self)

    # --- reading ---

    def resolve(self, ref: str | Reference) -> Version:
        parsed = self._seen(ref)
        with silent_of_others(self.prefix):
            return self._registry.resolve(parsed)

    def versions(self, name: str) -> list[Version]:
        self._seen(Reference(check_name(name)))
        with silent_of_others(self.prefix):
            return self._registry.versions(name)

    def versions_page(self, name: str, limit: int = PAGE, cursor: str | None = None) -> Page[Version]:
        self._seen(Reference(check_name(name)))
        with silent_of_others(self.prefix):
            return self._registry.versions_page(name, limit, cursor)

    def list(self) -> "list[Version]":
        return take(self.list_page)

    def list_page(self, limit: int = PAGE, cursor: str | None = None) -> Listing:
        page = self._registry.list_page(limit, cursor, prefix=self.prefix)
        return replace(
            page, aliases={name: found for name, found in page.aliases.items() if name.startswith(self.prefix)}
        )

    def aliases(self) -> dict[str, dict[str, int]]:
        found = self._registry.aliases()
        return {name: aliases for name, aliases in found.items() if name.startswith(self.prefix)}

    def search(self, query: str = "", sort: str = "-created", limit: int = SEARCH_LIMIT) -> "list[Version]":
        return self._registry.search(query, sort, limit, prefix=self.prefix)

    def search_page(
        self, query: str = "", sort: str = "-created", limit: int = PAGE, cursor: str | None = None
    ) -> Page[Version]:
        return self._registry.search_page(query, sort, limit, cursor, prefix=self.prefix)

    def history(self, name: str, alias: str) -> "list[AliasMove]":
        self._seen(Reference(check_name(name), alias=alias))
        with silent_of_others(self.prefix):
            found = self._registry.history(name, alias)
        return self._registry.catalog.moves(0, name, alias, len(found), self.prefix)

    def audit(self, name: str | None = None, limit: int = AUDIT_LIMIT) -> "list[Act]":
        if name:
            self._seen(Reference(check_name(name)))
        with silent_of_others(self.prefix):
            return self._registry.audit(name, limit, prefix=self.prefix)

    def audit_page(self, name: str | None = None, limit: int = PAGE, cursor: str | None = None) -> Page[Act]:
        if name is not None:
            self._seen(Reference(check_name(name)))
        with silent_of_others(self.prefix):
            return self._registry.audit_page(name, limit, cursor, prefix=self.prefix)

    def verify(self, ref: str | Reference | None = None) -> "list[Fault]":
        if ref is not None:
            return self._registry.verify(str(self.resolve(ref)))
        return [fault for fault in self._registry.verify() if fault.version.startswith(self.prefix)]

    def manifest(self, digest: str) -> Manifest:
        if check_digest(digest) not in self._digests():
            raise CorruptBlob(MANIFEST, digest, "missing")  # as a digest that nobody knows
        return self._registry.manifest(digest)

    def card(self, digest: str) -> str | None:
        if check_digest(digest) not in self._digests():
            raise CorruptBlob(MANIFEST, digest, "missing")
        return self._registry.card(digest)

    def has_blob(self, sha256: str) -> bool:
        """Whether a version of a name that is seen is made of it."""
        for digest in self._digests():
            with suppress(CorruptBlob, InvalidManifest):  # that one's files nobody can name
                if sha256 in self._marks.of([digest]):
                    return True
        return False

    # --- writing ---

    def publish(
        self,
        name: str,
        fill: Callable[[Path], tuple[FileEntry, ...]],
        base: BaseDescription,
        *,
        message: str,
        who: str | None,
    ) -> Version:
        self.own(name)
        return self._registry.publish(name, fill, base, message=message, who=who)

    def publish_draft(
        self,
        name: str,
        *,
        base: str | Path | BaseDescription | TrustedBases | None = None,
        message: str = "",
        number: int | None = None,
        alias: str | None = None,
        who: str | None = None,
    ) -> Version:
        self.own(name)
        return self._registry.publish_draft(name, base=base, message=message, number=number, alias=alias, who=who)

    def discard_draft(self, name: str) -> None:
        self.own(name)
        self._registry.discard_draft(name)

    def promote(
        self,
        ref: str | Reference,
        to: str,
        reason: str = "",
        *,
        require: Sequence[str] = (),
        who: str | None = None,
    ) -> AliasMove:
        parsed = ref if isinstance(ref, Reference) else Reference.parse(ref)
        self.own(parsed.name)
        with silent_of_others(self.prefix):
            return self._numbered(self._registry.promote(parsed, to, reason, require=require, who=who))

    def rollback(self, ref: str, to: int | None = None, reason: str = "", *, who: str | None = None) -> AliasMove:
        self.own(parse_alias(ref)[0])
        with silent_of_others(self.prefix):
            return self._numbered(self._registry.rollback(ref, to, reason, who=who))

    def remove_alias(self, ref: str, reason: str = "", *, who: str | None = None) -> AliasMove:
        self.own(parse_alias(ref)[0])
        with silent_of_others(self.prefix):
            return self._numbered(self._registry.remove_alias(ref, reason, who=who))

    def tag(
        self, ref: str | Reference, add: Sequence[str] = (), remove: Sequence[str] = (), *, who: str | None = None
    ) -> Version:
        parsed = ref if isinstance(ref, Reference) else Reference.parse(ref)
        self.own(parsed.name)
        with silent_of_others(self.prefix):
            return self._registry.tag(parsed, add, remove, who=who)

    def delete(self, ref: str, reason: str = "", *, who: str | None = None) -> Deletion:
        self.own(parse_version(ref)[0])
        with silent_of_others(self.prefix):
            return self._registry.delete(ref, reason, who=who)

    def restore(self, ref: str, reason: str = "", *, who: str | None = None) -> Deletion:
        self.own(parse_version(ref)[0])
        with silent_of_others(self.prefix):
            return self._registry.restore(ref, reason, who=who)

    def gc(self, *_options: object, **_named: object) -> Collected:
        raise self._all_names("gc")

    def own(self, name: str) -> None:
        """Raises Forbidden for a name that the token is not for."""
        if not name.startswith(self.prefix):
            raise Forbidden(
                f"the token '{self._identity.name}' is for names that begin with '{self.prefix}', and '{name}' does not"
            )

    # --- what is seen ---

    def _seen(self, ref: str | Reference) -> Reference:
        parsed = ref if isinstance(ref, Reference) else Reference.parse(ref)
        if not parsed.name.startswith(self.prefix):
            raise UnknownAdapter(str(parsed))
        return parsed

    def _numbered(self, move: AliasMove) -> AliasMove:
        """With the id that it has among the moves that are seen."""
        return replace(move, id=self._registry.catalog.place(move, self.prefix))

    def _digests(self) -> "list[str]":
        return self._registry.catalog.digests(self.prefix)

    def _all_names(self, what: str) -> Forbidden:
        return Forbidden(f"{what} concerns all names, and the token '{self._identity.name}' is for '{self.prefix}…'")


class LimitedDrafts:
    """Of some names alone."""

    def __init__(self, drafts: Drafts, registry: LimitedRegistry) -> None:
        self._drafts, self._registry = drafts, registry

    def find(self, name: str) -> Draft | None:
        return self._drafts.find(name) if name.startswith(self._registry.prefix) else None

    def page(self, name: str | None = None, limit: int = PAGE, cursor: str | None = None) -> Page[OpenDraft]:
        return self._drafts.page(name, limit, cursor, prefix=self._registry.prefix)

    def create(self, name: str, who: str) -> bool:
        self._registry.own(name)
        return self._drafts.create(name, who)

    def drop(self, name: str) -> bool:
        self._registry.own(name)
        return self._drafts.drop(name)

    @contextmanager
    def publishing(self) -> Iterator[Commit]:
        def own(name: str, changes: Changes, published: Callable[[], Tree]) -> str:
            self._registry.own(name)
            return keep(name, changes, published)

        with self._drafts.publishing() as keep:
            yield own


class LimitedSignatures:
    """Of some digests alone."""

    def __init__(self, signatures: Signatures, digests: list[str]) -> None:
        self._signatures, self._digests = signatures, digests

    def of(self, digest: str) -> list[Signature]:
        return self._signatures.of(digest) if check_digest(digest) in self._digests else []

    def add(self, digest: str, key: str, signature: str, *, who: str | None = None) -> Signature:
        if check_digest(digest) not in self._digests:
            raise UnknownDigest(digest)
        return self._signatures.add(digest, key, signature, who=who)


class LimitedProtections:
    """Of some names alone."""

    def __init__(self, protections: Protections, registry: LimitedRegistry) -> None:
        self._protections, self._registry = protections, registry

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
        self._registry.own(name)
        with silent_of_others(self._registry.prefix):
            return self._protections.protect(name, alias, require, signed_by, approvers, who=who)

    def unprotect(self, name: str, alias: str, *, who: str | None = None) -> Rule:
        self._registry.own(name)
        return self._protections.unprotect(name, alias, who=who)

    def list(self) -> "list[Rule]":
        return [rule for rule in self._protections.list() if rule.name.startswith(self._registry.prefix)]

    def approve(self, ref: str, alias: str, *, who: str | None = None) -> Approval:
        parsed = Reference.parse(ref)
        self._registry.own(parsed.name)
        with silent_of_others(self._registry.prefix):
            return self._protections.approve(parsed, alias, who=who)

    def approvals(self, ref: str) -> "list[Approval]":
        version = self._registry.resolve(ref)  # which answers as if other names were not there
        return self._protections.approvals(str(version))
