"""What the registry may forget: deleted versions past their grace, and blobs that no version and no draft refers to.

Marks and sweeps under the lock that publishing shares, so a push is either not begun for gc, or done. Removes nothing
unless it knows every file of every version. Decides nothing about versions; the catalog does.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from .blobs import BlobStore
from .catalog import Catalog
from .drafts import Drafts
from .errors import CorruptBlob, InvalidManifest, InvalidRequest
from .manifest import Manifest
from .version import Collected

GRACE_SECONDS = 2 * 3600
MAX_GRACE_SECONDS = 3650 * 24 * 3600


class Marks:
    """The blobs that versions refer to. A manifest never changes, so each is read once."""

    def __init__(self, read: Callable[[str], Manifest]) -> None:
        self._read = read
        self._blobs: dict[str, set[str]] = {}

    def of(self, digests: Iterable[str]) -> set[str]:
        """The sha256 of all that versions of these digests are made of. Raises CorruptBlob, InvalidManifest."""
        return set().union(*map(self._of, digests))

    def _of(self, digest: str) -> set[str]:
        if digest not in self._blobs:
            files = {entry.sha256 for entry in self._read(digest).files}
            self._blobs[digest] = files | {digest.removeprefix("sha256:")}
        return self._blobs[digest]


def collect(
    store: BlobStore,
    catalog: Catalog,
    drafts: Drafts,
    read: Callable[[str], Manifest],
    *,
    grace_seconds: int,
    keep: int | None,
    who: str,
    dry_run: bool,
) -> Collected:
    """One round of gc; `dry_run` changes nothing and answers the same. See Registry.gc."""
    if not 0 <= grace_seconds <= MAX_GRACE_SECONDS:
        told = f"grace_seconds is {grace_seconds}, expected 0 to {MAX_GRACE_SECONDS:,}, which is ten years"
        raise InvalidRequest(told, "grace_seconds")
    if keep is not None and keep < 1:
        raise InvalidRequest(f"keep is {keep}, expected 1 or more", "keep")
    marks = Marks(read)
    # Most of the reading is done before anybody has to wait. What cannot be read now may be on its way out; if it is
    # not, it is met again below, and stops the round.
    with suppress(CorruptBlob, InvalidManifest):
        marks.of(catalog.held())
    with catalog.collecting():
        with catalog.forgetting(grace_seconds, keep, who, dry_run) as (deleted, purged, held):
            marked = marks.of(held) | drafts.held()  # before versions are given up: when it fails, none is
        files, total_bytes = store.remove_unmarked(marked, time.time() - grace_seconds, dry_run)
    return Collected(dry_run, tuple(map(str, deleted)), tuple(map(str, purged)), files, total_bytes)
