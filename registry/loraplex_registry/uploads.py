"""Files that arrive over a network before the version they belong to. They wait in staging, proven by their sha256.

Knows no HTTP: it is handed chunks. What no version claims is swept with the other leftovers of staging.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from .blobs import BlobStore
from .errors import CorruptBlob, InvalidManifest, MissingBlobs, TooLarge
from .manifest import FileEntry
from .places import sync_folder


class Upload:
    """One file on its way in: write chunks, then finish. Leaving the block without finishing removes it."""

    def __init__(self, store: BlobStore, sha256: str, max_bytes: int) -> None:
        store.staging.mkdir(parents=True, exist_ok=True)
        self._sha256, self._max_bytes, self._received_bytes = sha256, max_bytes, 0
        self._place = arrived(store, sha256)
        self._digest = hashlib.sha256()
        handle, partial = tempfile.mkstemp(dir=store.staging, suffix=".part")
        self._stream, self._partial = os.fdopen(handle, "wb"), Path(partial)

    def __enter__(self) -> Self:
        return self

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge."""
        self._received_bytes += len(chunk)
        if self._received_bytes > self._max_bytes:
            raise TooLarge(f"the file is larger than {self._max_bytes:,} bytes, which is the limit")
        self._digest.update(chunk)
        self._stream.write(chunk)

    def finish(self) -> None:
        """Keep the file. Raises CorruptBlob when the bytes are not what their name says."""
        if self._digest.hexdigest() != self._sha256:
            raise CorruptBlob("the upload", f"sha256:{self._sha256}", f"in truth sha256:{self._digest.hexdigest()}")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._partial.chmod(0o644)
        self._partial.replace(self._place)
        sync_folder(self._place.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)


def arrived(store: BlobStore, sha256: str) -> Path:
    """Where an upload waits."""
    return store.staging / f"upload-{sha256}"


def gather(
    store: BlobStore, files: tuple[FileEntry, ...], folder: Path, may_use: Callable[[str], bool] = lambda sha256: True
) -> tuple[FileEntry, ...]:
    """Lay out a version's files, from uploads and from blobs that are there already; each is hashed where it lies.

    `may_use` says whether the blob with a sha256 may be built on; others are missing, as if they were not there.
    Raises MissingBlobs naming all that must be uploaded (again), InvalidManifest when paths collide.
    """
    paths = {entry.path for entry in files}
    parents = {parent.as_posix() for path in paths for parent in Path(path).parents}
    if len(paths) != len(files) or paths & parents:
        raise InvalidManifest("two files have the same path")
    folder.mkdir(parents=True)
    missing = [f"sha256:{entry.sha256}" for entry in files if not _lay(store, entry, folder / entry.path, may_use)]
    if missing:
        raise MissingBlobs(missing)
    return files


def forget(store: BlobStore, files: tuple[FileEntry, ...]) -> None:
    """Drop the uploads of files that are blobs now."""
    for entry in files:
        arrived(store, entry.sha256).unlink(missing_ok=True)


def _lay(store: BlobStore, entry: FileEntry, target: Path, may_use: Callable[[str], bool]) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    uploaded = arrived(store, entry.sha256)
    ways = [lambda: os.link(uploaded, target)]
    if may_use(entry.sha256):
        ways.append(lambda: store.place.lay(entry.sha256, target))
    for lay in ways:
        try:
            lay()
        except FileNotFoundError:
            continue
        if FileEntry.of(target, entry.path) == entry:
            return True
        target.unlink()
    return False
