"""The same verbs against a registry server: RemoteRegistry answers as Registry does, and raises the same errors.

Trusts no bytes: manifests and files are proven by their digests here. Knows the routes of `http`, and no store.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from .base import BaseDescription, describe_base
from .blobs import Progress, materialize, proven, read_chunks, silent
from .card import card_of
from .credentials import token_for
from .errors import (
    CorruptBlob,
    InvalidRequest,
    MissingBlobs,
    RateLimited,
    RegistryError,
    RemoteError,
    StoreUnavailable,
    UnknownDigest,
    WrongOffset,
)
from .events import StreamSource
from .garbage import GRACE_SECONDS
from .manifest import CHUNK_BYTES, FileEntry, Manifest, sha256_of
from .pages import PAGE, Listing, Page, check_limit, take
from .patience import Patience
from .reference import Reference, check_alias, check_digest, check_name, parse_alias, parse_version
from .registry import AUDIT_LIMIT, MANIFEST, SEARCH_LIMIT, Registry, find_base
from .remote_drafts import RemoteDrafts
from .remote_protections import RemoteProtections
from .remote_signatures import RemoteSignatures
from .remote_tokens import RemoteTokens
from .signing import PublicKey, check_signed
from .tokens import Identity
from .validate import Limits, adapter_files, check_adapter
from .version import Act, AliasMove, Collected, Deletion, Fault, Version
from .watch import Watch, ignore
from .wire import Proposal, dump, load, load_error

TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)  # between tries of an upload that was cut off
PUSH_TRIES = 6  # what was uploaded, or was there at first, may be gone by the next try: with another push, or by gc
RESUMED_BYTES = 1 << 20  # a smaller file is sent anew
DATABASE, STORE = "LORAPLEX_REGISTRY_DATABASE", "LORAPLEX_REGISTRY_STORE"
T = TypeVar("T")


class RemoteRegistry:
    """A registry behind a URL. Safe for many threads.

    `token` defaults to LORAPLEX_REGISTRY_TOKEN, then to what `registry login` kept for the URL. `patience` is for a
    server that takes no more requests just now; each of ours waits by itself.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        limits: Limits | None = None,
        timeout: httpx.Timeout | float = TIMEOUT_SECONDS,
        patience: Patience | None = None,
    ) -> None:
        self.url, self.limits, self._patience = url.rstrip("/"), limits or Limits(), patience or Patience()
        token = token or token_for(url)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.tokens, self.signatures = RemoteTokens(self._value), RemoteSignatures(self._value)
        self.protections, self.drafts = RemoteProtections(self._value), RemoteDrafts(self._page)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def whoami(self) -> Identity:
        """Who the server says we are, and what we may."""
        return self._value(Identity, "GET", "/v1/whoami")

    def push(
        self,
        name: str,
        folder: str | Path,
        *,
        base: str | Path | BaseDescription | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Version:
        """As Registry.push. The base is described here, the adapter is checked here and there."""
        check_name(name)
        folder = Path(folder)
        adapter_files(folder, self.limits)
        description = base if isinstance(base, BaseDescription) else find_base(folder, base)
        files = check_adapter(folder, description, self.limits).files
        route = f"/v1/adapters/{name}/versions"
        proposal = dump(Proposal, Proposal(files, description, message))
        for left in reversed(range(PUSH_TRIES)):
            try:
                return _load(Version, self._ask("POST", route, json=proposal))
            except MissingBlobs as missing:
                if not left:
                    raise
                for entry in files:
                    if f"sha256:{entry.sha256}" in missing.digests:
                        self._upload(folder / entry.path, entry, progress)
        raise AssertionError("the last try returns or raises")

    def publish_draft(
        self, name: str, *, base: str | Path | BaseDescription | None = None, message: str = ""
    ) -> Version:
        """As Registry.publish_draft. Without a base, the server looks among those that it trusts."""
        if isinstance(base, str | Path):
            base = describe_base(base)
        body = {"message": message} | ({"base": dump(BaseDescription, base)} if base else {})
        return _load(Version, self._ask("POST", f"/v1/adapters/{check_name(name)}/publish", json=body))

    def discard_draft(self, name: str) -> None:
        self._ask("POST", f"/v1/adapters/{check_name(name)}/discard")

    def resolve(self, ref: str | Reference) -> Version:
        return _load(Version, self._ask("GET", "/v1/resolve", params={"ref": str(ref)}))

    def versions(self, name: str) -> list[Version]:
        return take(lambda size, cursor: self.versions_page(name, size, cursor))

    def versions_page(self, name: str, limit: int = PAGE, cursor: str | None = None) -> Page[Version]:
        return self._page(Page[Version], f"/v1/adapters/{check_name(name)}/versions", limit, cursor)

    def list(self) -> "list[Version]":
        return take(self.list_page)

    def list_page(self, limit: int = PAGE, cursor: str | None = None) -> Listing:
        return self._page(Listing, "/v1/adapters", limit, cursor)

    def aliases(self) -> dict[str, dict[str, int]]:
        return _load(dict[str, dict[str, int]], self._ask("GET", "/v1/aliases", key="aliases"))

    def search(self, query: str = "", sort: str = "-created", limit: int = SEARCH_LIMIT) -> "list[Version]":
        return self.search_page(query, sort, limit).data

    def search_page(
        self, query: str = "", sort: str = "-created", limit: int = PAGE, cursor: str | None = None
    ) -> Page[Version]:
        return self._page(Page[Version], "/v1/search", limit, cursor, q=query, sort=sort)

    def promote(self, ref: str | Reference, to: str, reason: str = "", *, require: Sequence[str] = ()) -> AliasMove:
        body = {"ref": str(ref), "to": to, "reason": reason, "require": list(require)}
        return _load(AliasMove, self._ask("POST", "/v1/promote", json=body))

    def rollback(self, ref: str, to: int | None = None, reason: str = "") -> AliasMove:
        parse_alias(ref)
        return _load(AliasMove, self._ask("POST", "/v1/rollback", json={"ref": ref, "to": to, "reason": reason}))

    def remove_alias(self, ref: str, reason: str = "") -> AliasMove:
        parse_alias(ref)
        return _load(AliasMove, self._ask("POST", "/v1/unalias", json={"ref": ref, "reason": reason}))

    def tag(self, ref: str | Reference, add: Sequence[str] = (), remove: Sequence[str] = ()) -> Version:
        body = {"ref": str(ref), "add": [*add], "remove": [*remove]}
        return _load(Version, self._ask("POST", "/v1/tag", json=body))

    def delete(self, ref: str, reason: str = "") -> Deletion:
        parse_version(ref)
        return _load(Deletion, self._ask("POST", "/v1/delete", json={"ref": ref, "reason": reason}))

    def restore(self, ref: str, reason: str = "") -> Deletion:
        parse_version(ref)
        return _load(Deletion, self._ask("POST", "/v1/restore", json={"ref": ref, "reason": reason}))

    def history(self, name: str, alias: str) -> "list[AliasMove]":
        ref = f"{check_name(name)}@{check_alias(alias)}"
        return _load(_Moves, self._ask("GET", "/v1/history", params={"ref": ref}, key="data"))

    def audit(self, name: str | None = None, limit: int = AUDIT_LIMIT) -> "list[Act]":
        check_limit(limit, AUDIT_LIMIT)
        return take(lambda size, cursor: self.audit_page(name, size, cursor), limit)

    def audit_page(self, name: str | None = None, limit: int = PAGE, cursor: str | None = None) -> Page[Act]:
        return self._page(Page[Act], "/v1/audit", limit, cursor, name=name)

    def watch(
        self, ref: str | None = None, after: int | None = None, cut: Callable[[RegistryError], None] = ignore
    ) -> Watch:
        """As Registry.watch. A stream that is cut, or silent for too long, is asked for again where it broke off."""
        return self._patience.through(lambda: Watch(StreamSource(self._answer_now, ref), after, cut))

    def verify(self, ref: str | Reference | None = None) -> "list[Fault]":
        """As Registry.verify; the server hashes, so it may take as long as it takes."""
        params = {} if ref is None else {"ref": str(ref)}
        return _load(_Faults, self._ask("GET", "/v1/verify", params=params, timeout=None, key="data"))

    def gc(self, grace_seconds: int = GRACE_SECONDS, keep: int | None = None, dry_run: bool = False) -> Collected:
        """As Registry.gc; the server removes, so it may take as long as it takes."""
        body = {"grace_seconds": grace_seconds, "keep": keep, "dry_run": dry_run}
        return _load(Collected, self._ask("POST", "/v1/gc", json=body, timeout=None))

    def manifest(self, digest: str) -> Manifest:
        with self._answer("GET", f"/v1/manifests/{check_digest(digest)}") as response:
            data = response.read()
        if sha256_of(data) != digest:
            raise CorruptBlob(MANIFEST, digest, "not what its digest says")
        return Manifest.from_bytes(data)

    def card(self, digest: str) -> str | None:
        entry = card_of(self.manifest(digest))
        return entry and b"".join(self._chunks(entry)).decode(errors="replace")

    def fetch(self, digest: str, into: str | Path) -> Path:
        """As Registry.fetch: every file is proven by its sha256 here, all or nothing."""
        return materialize(self.manifest(digest), Path(into), self._chunks)

    def pull(self, ref: str | Reference, dest: str | Path, *, signed_by: Sequence[PublicKey] = ()) -> Version:
        """As Registry.pull; signatures are checked here."""
        version = self.resolve(ref)
        if signed_by:
            check_signed(str(version), version.digest, self.signatures.of(version.digest), signed_by)
        self.fetch(version.digest, dest)
        return version

    def _chunks(self, entry: FileEntry) -> Iterator[bytes]:
        try:
            with self._answer("GET", f"/v1/blobs/sha256:{entry.sha256}") as response:
                yield from proven(response.iter_bytes(CHUNK_BYTES), entry)
        except UnknownDigest as error:
            raise CorruptBlob(entry.path, f"sha256:{entry.sha256}", "missing") from error

    def _upload(self, file: Path, entry: FileEntry, progress: Progress) -> None:
        """Send a file; one that is cut off goes on where it stopped, also after another try in another process."""
        told_bytes = 0  # of this file, to whom the progress interests: never less than before

        def counted(offset: int) -> Iterator[bytes]:
            nonlocal told_bytes
            for chunk in read_chunks(file, offset):
                yield chunk
                offset += len(chunk)
                progress(max(offset - told_bytes, 0))
                told_bytes = max(offset, told_bytes)

        def send(offset: int) -> None:
            headers, route = {"Upload-Offset": str(offset)}, f"/v1/blobs/sha256:{entry.sha256}"
            with self._answer("PUT", route, content=lambda: counted(offset), headers=headers):
                pass

        pauses = iter(RETRY_SECONDS)
        while True:
            try:
                send(self._received(entry))
                return
            except (CorruptBlob, WrongOffset):  # what was kept there is of no use
                send(0)
                return
            except RemoteError as error:
                pause = next(pauses, None)
                if pause is None or not isinstance(error.__cause__, httpx.TransportError):
                    raise
                time.sleep(pause)

    def _received(self, entry: FileEntry) -> int:
        """Where to begin: what came before of a file that is worth going on with."""
        if entry.bytes < RESUMED_BYTES:
            return 0
        found = self._ask("GET", f"/v1/uploads/sha256:{entry.sha256}", key="received_bytes")
        return found if isinstance(found, int) and 0 <= found <= entry.bytes else 0

    def _page(self, kind: type[T], route: str, limit: int, cursor: str | None, **params: str | None) -> T:
        given = {key: value for key, value in (params | {"cursor": cursor}).items() if value is not None}
        answer = self._ask("GET", route, params=given | {"limit": limit})
        if not isinstance(answer, dict) or "data" not in answer:
            raise RemoteError(f"the registry at {self.url} answered GET {route} without 'data'")
        return _load(kind, answer)

    def _value(self, kind: type[T], method: str, route: str, **options: Any) -> T:
        """A successful answer, as a value of a type."""
        return _load(kind, self._ask(method, route, **options))

    def _ask(self, method: str, route: str, *, key: str | None = None, **options: Any) -> Any:
        """The JSON of a successful answer, or what it holds under `key`."""
        with self._answer(method, route, **options) as response:
            response.read()
            try:
                answer = response.json()
            except (ValueError, RecursionError) as error:
                raise RemoteError(f"the registry at {self.url} did not answer in JSON") from error
        if key is None:
            return answer
        if not isinstance(answer, dict) or key not in answer:
            raise RemoteError(f"the registry at {self.url} answered {method} {route} without '{key}'")
        return answer[key]

    @contextmanager
    def _answer(
        self, method: str, route: str, *, content: Callable[[], Iterator[bytes]] | None = None, **options: Any
    ) -> Iterator[httpx.Response]:
        """As `_answer_now`, after as many tries as the server wants and there is patience for.

        `content` gives the body, anew for each try.
        """

        def ask() -> AbstractContextManager[httpx.Response]:
            return self._answer_now(method, route, **options | ({"content": content()} if content else {}))

        with ExitStack() as held:
            yield self._patience.through(lambda: held.enter_context(ask()))

    @contextmanager
    def _answer_now(self, method: str, route: str, **options: Any) -> Iterator[httpx.Response]:
        """A successful answer, its body still to be read. Raises the server's error as the class it had there."""
        try:
            with self._http.stream(method, route, **options) as response:
                if not response.is_success:
                    response.read()
                    raise self._error(response)
                yield response
        except httpx.HTTPError as error:
            raise RemoteError(f"the registry at {self.url} does not answer: {error}") from error

    def _error(self, response: httpx.Response) -> Exception:
        try:
            error = load_error(response.json())
        except ValueError:
            error = RemoteError(f"the registry at {self.url} answered {response.status_code} {response.reason_phrase}")
        if response.status_code == 429:  # the registry's, or a proxy's with words of its own
            limit, asked = getattr(error, "limit", "the allowed"), response.headers.get("Retry-After", "")
            return RateLimited(limit, int(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0)
        return error


_Moves, _Faults = list[AliasMove], list[Fault]  # the class has a method called list


def open_registry(
    where: str | Path | None = None,
    *,
    database: str | None = None,
    store: str | None = None,
    patience: Patience | None = None,
) -> Registry | RemoteRegistry:
    """The registry in a folder or behind a URL; None is the default folder. Raises StoreUnavailable.

    A folder's catalog lies in `database`, else in LORAPLEX_REGISTRY_DATABASE, else in the folder; its blobs in `store`,
    else in LORAPLEX_REGISTRY_STORE, else in the folder. `patience` is for a URL.
    """
    if where and str(where).startswith(("http://", "https://")):
        return RemoteRegistry(str(where), patience=patience)
    if re.match(r"[a-z][a-z0-9+.-]*://", str(where), re.IGNORECASE):  # mistyped: it would become a folder
        raise StoreUnavailable(f"the registry '{where}': expected a folder, http:// or https://")
    database, store = database or os.environ.get(DATABASE), store or os.environ.get(STORE)
    return Registry(where or Registry.default_root(), database=database, store=store)


def _load(kind: type[T], answer: object) -> T:
    try:
        return load(kind, answer)
    except InvalidRequest as error:
        raise RemoteError(f"the registry server's answer cannot be read: {error}") from error
