"""The registry in a folder: push, resolve, promote, rollback, fetch, verify.

Owns the order in which a push becomes real: blobs first, then the manifest, then the row, so that whoever sees a row
can read all it names. Knows no HTTP.
"""

import getpass
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from platformdirs import user_data_path

from .adapter_config import read_config
from .base import BaseDescription, describe_base
from .blobs import BlobStore, Progress, materialize, read_chunks, silent, write_durably
from .bucket import Bucket
from .card import card_of, first_words
from .catalog import Catalog
from .database import open_database
from .drafts import Drafts
from .errors import (
    BaseNotFound,
    InvalidAdapter,
    InvalidManifest,
    NoDraft,
    RegistryError,
    StoreUnavailable,
)
from .finding import Finder
from .garbage import GRACE_SECONDS, collect
from .manifest import BaseRef, FileEntry, Manifest
from .pages import PAGE, PAGE_LIMIT, Listing, Page, check_limit, take
from .protections import Protections
from .query import Comparison
from .receipt import Receipt
from .reference import Reference, check_alias, check_digest, check_name, check_tag, parse_alias, parse_version
from .signatures import Signatures
from .signing import PublicKey, check_signed
from .tokens import ADMIN, Identity, Tokens
from .trusted_bases import TrustedBases
from .uploads import gather
from .validate import CheckedAdapter, Limits, adapter_files, check_adapter
from .version import Act, AliasMove, Collected, Deletion, Fault, Version
from .watch import LedgerSource, Watch, ignore

MESSAGE_CHARACTERS = 4096
SEARCH_LIMIT = PAGE_LIMIT
AUDIT_LIMIT = 10_000
CATALOG = "catalog.sqlite3"
MANIFEST = "manifest.json"  # how errors and faults call the manifest; it is stored by its digest


class Registry:
    """Adapter versions in one folder: `catalog.sqlite3`, `blobs/`, `staging/`. Safe for many threads and processes.

    With a `database`, a PostgreSQL URL, the catalog lies there instead, for many machines; with a `store`, a URL like
    s3://bucket/prefix, so do the blobs. Staging is always in the folder.
    """

    def __init__(
        self, root: str | Path, limits: Limits | None = None, *, database: str | None = None, store: str | None = None
    ) -> None:
        """Open the folder, or make it. Raises StoreUnavailable."""
        self.root = Path(root).expanduser()
        self.limits = limits or Limits()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreUnavailable(f"the data directory '{self.root}' is not a folder") from error
        except OSError as error:
            raise StoreUnavailable(f"the data directory '{self.root}' cannot be made: {error.strerror}") from error
        self.store = BlobStore(self.root, Bucket(store) if store else None)
        opened = open_database(self.root / CATALOG, database)
        self.catalog, self.drafts = Catalog(opened), Drafts(opened)
        self._finder = Finder(self.catalog.reading)
        self.tokens = Tokens(self.catalog, whoami)
        self.signatures = Signatures(self.catalog, whoami)
        self.protections = Protections(self.catalog, self.signatures, whoami)
        elsewhere = [*([opened.where] if database else []), *([self.store.place.where] if store else [])]
        self.where = f"{self.root}, {', '.join(elsewhere)}" if elsewhere else str(self.root)

    @staticmethod
    def default_root() -> Path:
        """`$LORAPLEX_HOME/registry`, or `registry` in the platform's data folder."""
        home = os.environ.get("LORAPLEX_HOME")
        return (Path(home).expanduser() if home else user_data_path("loraplex")) / "registry"

    def close(self) -> None:
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def whoami(self) -> Identity:
        """Who we are here: whoever has the folder may do everything."""
        return Identity(whoami(), (ADMIN,))

    # --- push ---

    def push(
        self,
        name: str,
        folder: str | Path,
        *,
        base: str | Path | BaseDescription | None = None,
        message: str = "",
        who: str | None = None,
        progress: Progress = silent,
    ) -> Version:
        """Check an adapter folder against its base and keep it as the next version of `name`.

        Bytes that a version of `name` has already make no new one: that version is returned, with `pushed` False;
        if it was deleted, it is restored.
        Raises InvalidReference, InvalidAdapter, BaseNotFound, StoreUnavailable.
        """
        check_name(name)
        folder = Path(folder)
        paths = adapter_files(folder, self.limits)
        description = base if isinstance(base, BaseDescription) else find_base(folder, base)

        def fill(staged: Path) -> tuple[FileEntry, ...]:
            entries = []
            for path in paths:
                relative = path.relative_to(folder).as_posix()
                entries.append(replace(write_durably(read_chunks(path), staged / relative, progress), path=relative))
            return tuple(entries)

        return self.publish(name, fill, description, message=message, who=who)

    def publish(
        self,
        name: str,
        fill: Callable[[Path], tuple[FileEntry, ...]],
        base: BaseDescription | Callable[[Path], BaseDescription],
        *,
        message: str,
        who: str | None,
        number: int | None = None,
    ) -> Version:
        """The second half of a push: `fill` puts flushed files into staging; they are checked where they lie.

        `base` may be told from what was staged. With `number`, it gets that one, or NumberTaken is raised.
        """
        if len(message) > MESSAGE_CHARACTERS:
            raise InvalidAdapter(
                f"the message has {len(message):,} characters, at most {MESSAGE_CHARACTERS:,} are kept"
            )
        with writing(self.root), self.store.stage() as folder:
            files = fill(folder / "adapter")
            base = base if isinstance(base, BaseDescription) else base(folder / "adapter")
            checked = check_adapter(folder / "adapter", base, self.limits, files)
            manifest = Manifest(checked.files, base_ref(checked, base), checked.config)
            write_durably(iter([manifest.canonical()]), folder / MANIFEST)
            draft = _draft(name, checked, manifest, message, who or whoami())
            draft = replace(draft, description=first_words(folder / "adapter"))
            with self.catalog.publishing() as add:
                for entry in manifest.files:
                    self.store.publish(folder / "adapter" / entry.path, entry.sha256)
                self.store.publish(folder / MANIFEST, manifest.digest.removeprefix("sha256:"))
                return add(draft, number)

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
        """Make a version of the files that were uploaded to `name` by commits, checked as at any push.

        Without a base, the one that the files name is looked up in the Hub's cache; no path that they name is read.
        Without a message, the version's is what the commits said. `number` is the one it must get; `alias` is pointed
        at it. The draft ends with that, unless it was changed meanwhile. Raises InvalidReference, NoDraft,
        BaseNotFound, InvalidAdapter, NumberTaken, MissingBlobs when a file is damaged.
        """
        check_name(name)
        if alias is not None:
            check_alias(alias)
        draft = self.drafts.find(name)
        if draft is None:
            raise NoDraft(name)
        if isinstance(base, str | Path):
            base = describe_base(base)
        trusted = TrustedBases() if base is None else base

        def describe(folder: Path) -> BaseDescription:
            adapter_files(folder, self.limits)  # what is wrong with the files is told before what they say
            return trusted.find(folder, self.catalog.base_ids) if isinstance(trusted, TrustedBases) else trusted

        def fill(folder: Path) -> tuple[FileEntry, ...]:
            return gather(self.store, draft.files, folder)

        message = message or "\n".join(draft.messages)[:MESSAGE_CHARACTERS]
        version = self.publish(name, fill, describe, message=message, who=who, number=number)
        if alias is not None:
            self.promote(str(version), alias, message, who=who)
        self.drafts.drop(name, draft.commit)
        return version

    def discard_draft(self, name: str) -> None:
        """Forget the files that were uploaded to `name` and are no version. Raises InvalidReference, NoDraft."""
        if not self.drafts.drop(check_name(name)):
            raise NoDraft(name)

    # --- names ---

    def resolve(self, ref: str | Reference) -> Version:
        """The version a reference stands for now. Raises InvalidReference, NotFound."""
        return self.catalog.resolve(_reference(ref))

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, oldest first. Raises InvalidReference, UnknownAdapter."""
        return self.catalog.versions(check_name(name))

    def versions_page(self, name: str, limit: int = PAGE, cursor: str | None = None) -> Page[Version]:
        """Part of `versions`; the cursor is the `next` of the page before. Raises InvalidRequest too."""
        page = self._finder.versions(check_name(name), limit, cursor)
        if not page.data and not cursor:
            self.catalog.versions(name)  # which says what is wrong with the name
        return page

    def list(self) -> "list[Version]":
        """The newest version of each name, by name."""
        return take(self.list_page)

    def list_page(self, limit: int = PAGE, cursor: str | None = None, *, prefix: str = "") -> Listing:
        """Part of `list`, with the aliases of the names in it. Raises InvalidRequest."""
        return self._finder.newest(limit, cursor, prefix)

    def aliases(self) -> dict[str, dict[str, int]]:
        """Where every alias points: name → alias → version number."""
        return self.catalog.aliases()

    def search(
        self, query: str = "", sort: str = "-created", limit: int = SEARCH_LIMIT, *, prefix: str = ""
    ) -> "list[Version]":
        """The versions for which every term of the query holds (see query.py), at most `limit`.

        `sort` is a key, or `-` and a key for the highest first; versions without it come last. `prefix` is what names
        begin with. Raises InvalidQuery.
        """
        return self.search_page(query, sort, limit, prefix=prefix).data

    def search_page(
        self, query: str = "", sort: str = "-created", limit: int = PAGE, cursor: str | None = None, *, prefix: str = ""
    ) -> Page[Version]:
        """Part of what a search finds; the cursor is the `next` of the page before. Raises InvalidRequest too."""
        return self._finder.search(query, sort, limit, cursor, prefix)

    def promote(
        self,
        ref: str | Reference,
        to: str,
        reason: str = "",
        *,
        require: Sequence[str] = (),
        who: str | None = None,
    ) -> AliasMove:
        """Point the alias `to` at a version and write it in the ledger.

        `require` are comparisons that must hold for the version (`f1>=0.9`); the ledger's reason names them. What a
        protected alias's rule asks must hold too. Raises InvalidReference, InvalidQuery, NotFound, RequirementNotMet.
        """
        required = tuple(map(Comparison.parse, require))
        why = "; ".join(filter(None, [reason, f"required {', '.join(map(str, required))}" if required else ""]))
        with writing(self.root):
            rule = self.protections.unmet
            return self.catalog.promote(_reference(ref), check_alias(to), who or whoami(), why, required, rule=rule)

    def rollback(self, ref: str, to: int | None = None, reason: str = "", *, who: str | None = None) -> AliasMove:
        """Point `name@alias` at its previous target, or at version `to`; the ledger gets a row.

        Raises InvalidReference, NotFound, NothingToRollBack; RequirementNotMet when the alias is protected, `to` was
        never its target, and the rule does not hold.
        """
        with writing(self.root):
            rule = self.protections.unmet
            return self.catalog.rollback(*parse_alias(ref), to, who or whoami(), reason, rule=rule)

    def remove_alias(self, ref: str, reason: str = "", *, who: str | None = None) -> AliasMove:
        """Remove `name@alias`: it stands for nothing until it is set again; the ledger gets a row.

        Without `production`, a bare name means the newest version. Raises InvalidReference, NotFound;
        RequirementNotMet when the alias is protected.
        """
        name, alias = parse_alias(ref)
        with writing(self.root):
            return self.catalog.remove_alias(name, alias, who or whoami(), reason, protects=self.protections.protects)

    def tag(
        self, ref: str | Reference, add: Sequence[str] = (), remove: Sequence[str] = (), *, who: str | None = None
    ) -> Version:
        """Put tags on a version and take others off; the audit log says who did. Returns the version as it is then.

        Raises InvalidReference, NotFound.
        """
        for tag in (*add, *remove):
            check_tag(tag)
        with writing(self.root):
            return self.catalog.tag(_reference(ref), add, remove, who or whoami())

    def delete(self, ref: str, reason: str = "", *, who: str | None = None) -> Deletion:
        """Hide the version `name:3`: it neither resolves nor is listed, until it is restored or pushed again.

        Its number is never given again. Raises InvalidReference, NotFound, VersionInUse when an alias points to it.
        """
        with writing(self.root):
            return self.catalog.delete(*parse_version(ref), who or whoami(), reason)

    def restore(self, ref: str, reason: str = "", *, who: str | None = None) -> Deletion:
        """Show the deleted version `name:3` again. Raises InvalidReference, NotFound, NotDeleted."""
        with writing(self.root):
            return self.catalog.restore(*parse_version(ref), who or whoami(), reason)

    def history(self, name: str, alias: str) -> "list[AliasMove]":
        """The alias's moves, oldest first. Raises UnknownAdapter, UnknownAlias."""
        return self.catalog.history(check_name(name), check_alias(alias))

    def audit(self, name: str | None = None, limit: int = AUDIT_LIMIT, *, prefix: str = "") -> "list[Act]":
        """What was done to a name's versions and aliases, or to all, newest first, at most `limit`.

        With a `prefix`, to names that begin with it. Raises InvalidReference, UnknownAdapter, InvalidRequest.
        """
        check_limit(limit, AUDIT_LIMIT)
        return take(lambda size, cursor: self.audit_page(name, size, cursor, prefix=prefix), limit)

    def audit_page(
        self, name: str | None = None, limit: int = PAGE, cursor: str | None = None, *, prefix: str = ""
    ) -> Page[Act]:
        """Part of `audit`; the cursor is the `next` of the page before."""
        page = self._finder.audit(None if name is None else check_name(name), limit, cursor, prefix)
        if name and not page.data and not cursor:
            self.catalog.versions(name)  # which says what is wrong with the name
        return page

    def watch(
        self, ref: str | None = None, after: int | None = None, cut: Callable[[RegistryError], None] = ignore
    ) -> Watch:
        """The moves of all aliases, of a name's, or of `name@alias`, as they are made, by whatever process.

        From now on, or after the ledger's row `after` (a move's `id`). An alias may be watched before it is there. See
        Watch for `cut` and how to end it. Raises InvalidReference, UnknownAdapter, InvalidRequest.
        """
        return Watch(LedgerSource(self.catalog, ref), after, cut)

    # --- content ---

    def manifest(self, digest: str) -> Manifest:
        """The manifest of a version. Raises CorruptBlob when it is missing or altered."""
        return Manifest.from_bytes(self.store.read(check_digest(digest).removeprefix("sha256:"), MANIFEST))

    def card(self, digest: str) -> str | None:
        """The README.md of a version, proven; None when it has none of at most 1 MiB. Raises CorruptBlob."""
        entry = card_of(self.manifest(digest))
        return entry and b"".join(self.store.chunks(entry)).decode(errors="replace")

    def fetch(self, digest: str, into: str | Path) -> Path:
        """Write a version's files to a new folder, each proven by its sha256, all or nothing.

        Raises CorruptBlob, FolderNotEmpty.
        """
        return materialize(self.manifest(digest), Path(into), self.store.chunks)

    def pull(self, ref: str | Reference, dest: str | Path, *, signed_by: Sequence[PublicKey] = ()) -> Version:
        """Resolve once, then fetch that digest; if keys are given, only when one of them has signed it.

        Raises NotFound, NotSigned, CorruptBlob, FolderNotEmpty.
        """
        version = self.resolve(ref)
        if signed_by:
            check_signed(str(version), version.digest, self.signatures.of(version.digest), signed_by)
        self.fetch(version.digest, dest)
        return version

    def gc(
        self,
        grace_seconds: int = GRACE_SECONDS,
        keep: int | None = None,
        dry_run: bool = False,
        *,
        who: str | None = None,
    ) -> Collected:
        """Remove the bytes that nothing holds: of versions deleted before the grace, and of pushes that never ended.

        With `keep`, first delete what is older than the newest `keep` versions of its name, except what an alias
        points to or would roll back to. Never waits for a push to be checked, only for one that is being published.
        Raises InvalidRequest; CorruptBlob or InvalidManifest, removing nothing, when a version's manifest cannot be
        read: nobody knows then which files are its own.
        """
        with writing(self.root):
            return collect(
                self.store,
                self.catalog,
                self.drafts,
                self.manifest,
                grace_seconds=grace_seconds,
                keep=keep,
                who=who or whoami(),
                dry_run=dry_run,
            )

    def verify(self, ref: str | Reference | None = None) -> "list[Fault]":
        """Hash every file of one version, or of all, and name each fault with each version it harms."""
        known: dict[FileEntry, str | None] = {}  # a file that many versions share is hashed once
        found = []
        for version in [self.resolve(ref)] if ref is not None else self.catalog.all():
            if what := self.store.fault(FileEntry(MANIFEST, version.digest.removeprefix("sha256:"), 0)):
                found.append(Fault(str(version), MANIFEST, what))
                continue
            try:
                files = self.manifest(version.digest).files
            except InvalidManifest as error:  # whole, but written by another release
                found.append(Fault(str(version), MANIFEST, f"unreadable: {error}"))
                continue
            for entry in files:
                if entry not in known:
                    known[entry] = self.store.fault(entry)
                if what := known[entry]:
                    found.append(Fault(str(version), entry.path, what))
        return found


def find_base(folder: Path, base: str | Path | None) -> BaseDescription:
    """Describe the given base, or else the one that the adapter's receipt or configuration names.

    Raises BaseNotFound, InvalidAdapter.
    """
    if base is not None:
        return describe_base(base)
    receipt, config = Receipt.read(folder), read_config(folder)
    if receipt.base_path and Path(receipt.base_path).is_dir():
        return describe_base(receipt.base_path)
    if receipt.base:
        return describe_base(receipt.base.id, receipt.base.revision)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise BaseNotFound("the adapter does not say which base it belongs to; name it with --base ID_OR_PATH")
    return describe_base(named, config.get("revision"))


def whoami() -> str:
    """The user's login name, or the number where it has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _reference(ref: str | Reference) -> Reference:
    return ref if isinstance(ref, Reference) else Reference.parse(ref)


def base_ref(checked: CheckedAdapter, base: BaseDescription) -> BaseRef:
    """What the version says of its base: the trainer's words first, so that one adapter gives one digest everywhere."""
    trained = checked.receipt.base
    named = trained.id if trained else checked.config.get("base_model_name_or_path")
    return BaseRef(
        id=named or base.id,
        revision=trained.revision if trained else checked.config.get("revision"),
        fingerprint=base.fingerprint or (trained.fingerprint if trained else None),
        quantization=trained.quantization if trained else None,
    )


def _draft(name: str, checked: CheckedAdapter, manifest: Manifest, message: str, who: str) -> Version:
    return Version(
        name=name,
        number=0,  # the catalog gives the number
        digest=manifest.digest,
        base=manifest.base,
        rank=checked.rank,
        targets=checked.targets,
        bytes=sum(entry.bytes for entry in manifest.files),
        metrics=checked.receipt.metrics or {},
        parent=checked.receipt.parent,
        lineage=checked.receipt.lineage,
        created_at=datetime.now(UTC),
        created_by=who,
        message=message,
    )


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """An operating system's refusal (permission, full disk) inside the data directory, in one clear line."""
    try:
        yield
    except RegistryError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"the data directory '{root}' cannot be written: {error.strerror}") from error
