"""Files that arrive over a network before the version they belong to. They wait in staging, proven by their sha256.

Knows no HTTP: it is handed chunks. What no version claims is swept with the other leftovers of staging.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Self

from .blobs import BlobStore
from .errors import CorruptBlob, InvalidManifest, MissingBlobs, TooLarge, WrongOffset
from .manifest import FileEntry
from .places import sync_folder

GONE_SECONDS = 5.0  # until the end of a connection that was cut off is noticed


class Upload:
    """One file on its way in: write chunks, then finish. A block that is left before keeps what came, to go on there.

    It is kept for who sends it alone, so that nobody spoils it. Where the same is sent twice at once, one of the two is
    not kept.
    """

    def __init__(self, store: BlobStore, sha256: str, max_bytes: int, who: str, offset: int = 0) -> None:
        """Go on after `offset` bytes; 0 begins anew. Raises WrongOffset."""
        store.staging.mkdir(parents=True, exist_ok=True)
        self._store, self._sha256, self._max_bytes = store, sha256, max_bytes
        self._place = arrived(store, sha256)
        self._partial = _partial(store, sha256, who)
        stream = _opened_alone(self._partial, GONE_SECONDS if offset else 0)
        self._keep = stream is not None
        if stream is None:
            handle, private = tempfile.mkstemp(dir=store.staging, suffix=".part")
            stream, self._partial = os.fdopen(handle, "r+b"), Path(private)
        self._stream = stream
        received_bytes = os.fstat(stream.fileno()).st_size
        if offset and offset != received_bytes:
            self.__exit__(None, None, None)
            raise WrongOffset(offset, received_bytes)
        if not offset:
            stream.truncate()
        self._digest, self._received_bytes = hashlib.file_digest(stream, "sha256"), offset

    def __enter__(self) -> Self:
        return self

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge."""
        self._received_bytes += len(chunk)
        if self._received_bytes > self._max_bytes:
            self._keep = False
            raise TooLarge(f"the file is larger than {self._max_bytes:,} bytes, which is the limit")
        self._digest.update(chunk)
        self._stream.write(chunk)
        self._stream.flush()  # who asks where to go on is told at once

    def finish(self) -> None:
        """Keep the file for good. Raises StoreUnavailable; CorruptBlob when the bytes are not what their name says."""
        self._keep = False
        if self._digest.hexdigest() != self._sha256:
            raise CorruptBlob("the upload", f"sha256:{self._sha256}", f"in truth sha256:{self._digest.hexdigest()}")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._partial.chmod(0o644)
        self._store.place.share(self._partial, self._sha256)
        self._partial.replace(self._place)
        self._keep = True  # what lies under the old name from now on is somebody else's
        sync_folder(self._place.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._keep:
                self._partial.unlink(missing_ok=True)  # while it is locked, so that it is nobody else's
        finally:
            self._stream.close()


def received(store: BlobStore, sha256: str, who: str) -> int:
    """How many bytes of a file came from somebody whose upload was cut off; 0 when none is kept."""
    try:
        return _partial(store, sha256, who).stat().st_size
    except FileNotFoundError:
        return 0


def _partial(store: BlobStore, sha256: str, who: str) -> Path:
    return store.staging / f"upload-{sha256}-{hashlib.sha256(who.encode()).hexdigest()[:16]}.part"


def _opened_alone(file: Path, patience_seconds: float) -> BufferedRandom | None:
    """The file, made if it is new, and locked until it is closed; None while somebody else writes to it."""
    until = time.monotonic() + patience_seconds
    while True:
        stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        with suppress(BlockingIOError, FileNotFoundError):  # it is in use; who used it has finished just now
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                return stream
        stream.close()
        if time.monotonic() >= until:
            return None
        time.sleep(0.02)


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
