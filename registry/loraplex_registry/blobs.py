"""The store of blobs: content named by its sha256. Owns how bytes become durable and how they are proven on reading.

Knows no versions. A file is staged (copied, flushed) in a folder, then published to where blobs lie; an interrupted
push leaves only staging leftovers, which a later push sweeps away.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from .errors import CorruptBlob, FolderNotEmpty, StoreUnavailable
from .manifest import CHUNK_BYTES, FileEntry, Manifest
from .places import Folder, Place
from .shared_reads import PIECE_BYTES, SharedReads

GRACE_SECONDS = 6 * 3600.0
Progress = Callable[[int], None]


def silent(_bytes: int) -> None:
    """The progress of those who do not look."""


class BlobStore:
    """Blobs in a place, the root's own folder unless another is given, and `root/staging/`, which is always local."""

    def __init__(self, root: Path, place: Place | None = None) -> None:
        self.staging, self.place = root / "staging", place or Folder(root)
        self._reads = SharedReads()

    # --- writing ---

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A folder of one's own in staging, removed at the end."""
        self.sweep()
        self.staging.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.staging, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def sweep(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Remove what killed pushes left in staging: whatever nobody wrote to for the grace period."""
        if not self.staging.is_dir():
            return
        oldest = time.time() - grace_seconds
        for path in self.staging.iterdir():
            if _last_written(path) < oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def publish(self, staged: Path, sha256: str) -> None:
        """Put a staged, flushed file in its place. A blob already there is replaced by the same, proven bytes."""
        self.place.put(staged, sha256)

    # --- removing ---

    def remove_unmarked(self, marked: set[str], before: float, dry_run: bool) -> tuple[int, int]:
        """Remove the blobs that are not marked and were last written at the time `before` or earlier.

        Returns how many, and their bytes; a dry run only counts. The caller holds the catalog's `collecting`.
        """
        stale = [blob for blob in self.place.all() if blob.sha256 not in marked and blob.written_at <= before]
        if not dry_run:
            self.place.remove(blob.sha256 for blob in stale)
        return len(stale), sum(blob.bytes for blob in stale)

    # --- reading ---

    def read(self, sha256: str, path: str) -> bytes:
        """A small blob's bytes, proven. Raises CorruptBlob."""
        return b"".join(self.chunks(FileEntry(path, sha256, 0)))

    def chunks(self, entry: FileEntry) -> Iterator[bytes]:
        """The blob's bytes; the last chunk comes only after the digest was right. Raises CorruptBlob."""
        try:
            yield from proven(self.unproven(entry.sha256), entry)
        except FileNotFoundError as error:
            raise CorruptBlob(entry.path, f"sha256:{entry.sha256}", "missing") from error

    def unproven(self, sha256: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """A blob's bytes from start to stop, as they lie: whoever gets them proves them. Raises FileNotFoundError.

        Those who read one blob at the same time share the reading of it.
        """
        with self.place.opened(sha256) as read:

            def read_piece(number: int) -> bytes:
                return read(number * PIECE_BYTES, PIECE_BYTES)

            at = start - start % PIECE_BYTES
            with closing(self._reads.pieces(sha256, read_piece, start // PIECE_BYTES)) as pieces:
                for piece in pieces:
                    wanted = piece[max(start - at, 0) : None if stop is None else stop - at]
                    at += len(piece)
                    if wanted:
                        yield wanted
                    if stop is not None and at >= stop:
                        return

    def fault(self, entry: FileEntry) -> str | None:
        """What is wrong with a blob: missing, truncated, altered; or None. Raises StoreUnavailable."""
        digest, found_bytes = hashlib.sha256(), 0
        try:
            with self.place.opened(entry.sha256) as read:
                while piece := read(found_bytes, PIECE_BYTES):
                    digest.update(piece)
                    found_bytes += len(piece)
        except FileNotFoundError:
            return "missing"
        except StoreUnavailable:  # which says nothing about this blob
            raise
        except OSError as error:
            return f"unreadable: {error.strerror}"
        if digest.hexdigest() == entry.sha256:
            return None
        return f"truncated: {found_bytes} of {entry.bytes} bytes" if found_bytes < entry.bytes else "altered"


def proven(chunks: Iterator[bytes], entry: FileEntry) -> Iterator[bytes]:
    """Pass chunks on, holding each back until the next came, and the last until the sha256 was right.

    Raises CorruptBlob.
    """
    digest, held = hashlib.sha256(), b""
    for chunk in chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != entry.sha256:
        raise CorruptBlob(entry.path, f"sha256:{entry.sha256}", "not what its digest says")
    if held:
        yield held


def write_durably(chunks: Iterator[bytes], file: Path, progress: Progress = silent) -> FileEntry:
    """Write chunks to a new file and flush it to the disk; the entry's path is the file's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    digest, total_bytes = hashlib.sha256(), 0
    with file.open("xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            total_bytes += len(chunk)
            progress(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(file.name, digest.hexdigest(), total_bytes)


def read_chunks(file: Path, offset: int = 0) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(offset)
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def materialize(manifest: Manifest, into: Path, chunks: Callable[[FileEntry], Iterator[bytes]]) -> Path:
    """Write a version's files to `into`, all or nothing. `into` is new, empty, or already holds exactly this version.

    Raises CorruptBlob, FolderNotEmpty.
    """
    into = into.absolute()
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.", ignore_cleanup_errors=True) as partial:
        if _holds(into, manifest):
            return into
        content = Path(partial) / "content"
        for entry in manifest.files:
            write_durably(chunks(entry), content / entry.path)
        try:
            content.rename(into)
        except OSError as error:  # somebody was faster, or something else lies there
            if not _holds(into, manifest):
                raise FolderNotEmpty(f"'{into}' holds something else; give a new or an empty folder") from error
    return into


def _holds(folder: Path, manifest: Manifest) -> bool:
    if not folder.is_dir():
        return False
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return found.keys() == {entry.path for entry in manifest.files} and all(
        FileEntry.of(found[entry.path], entry.path) == entry for entry in manifest.files
    )


def _last_written(path: Path) -> float:
    """The newest time of change of a file, or of a folder and all in it; now, when its owner is just removing it."""
    try:
        return max(inside.lstat().st_mtime for inside in (path, *path.rglob("*")))
    except FileNotFoundError:
        return time.time()
