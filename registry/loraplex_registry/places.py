"""Where blobs lie: what a place must do, and the place that is a folder. Whether bytes are right is not its to say."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Read = Callable[[int, int], bytes]  # from a byte on, at most so many; fewer at the end


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob as it lies; `written_at` in seconds since 1970."""

    sha256: str
    bytes: int
    written_at: float


class Place(Protocol):
    """Blobs by their sha256. What cannot be done raises OSError, or StoreUnavailable, which is one."""

    where: str  # for people, without anything secret

    def put(self, staged: Path, sha256: str) -> None:
        """Keep a staged, flushed file; durable, and all at once. A blob already there is replaced."""
        ...

    def share(self, uploaded: Path, sha256: str) -> None:
        """Let those find a file that was uploaded here who do not have the folder in which it waits."""
        ...

    def size(self, sha256: str) -> int:
        """Its bytes. Raises FileNotFoundError."""
        ...

    def opened(self, sha256: str) -> AbstractContextManager[Read]:
        """A way to read it. Raises FileNotFoundError."""
        ...

    def lay(self, sha256: str, target: Path) -> None:
        """Make a new file of it. Raises FileNotFoundError."""
        ...

    def all(self) -> Iterator[Stored]:
        """Every blob."""
        ...

    def remove(self, blobs: Iterable[str]) -> None:
        """Remove blobs that are there."""
        ...


class Folder:
    """`blobs/sha256/ab/<hex>` below a root."""

    def __init__(self, root: Path) -> None:
        self.where, self.blobs = str(root), root / "blobs" / "sha256"

    def path(self, sha256: str) -> Path:
        return self.blobs / sha256[:2] / sha256

    def put(self, staged: Path, sha256: str) -> None:
        target = self.path(sha256)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.blobs.parent.parent, self.blobs.parent, self.blobs):
                sync_folder(folder)
        staged.replace(target)
        sync_folder(target.parent)

    def share(self, uploaded: Path, sha256: str) -> None:
        """Whoever has this folder has its staging."""

    def size(self, sha256: str) -> int:
        return self.path(sha256).stat().st_size

    @contextmanager
    def opened(self, sha256: str) -> Iterator[Read]:
        with self.path(sha256).open("rb", buffering=0) as file:
            yield lambda start, most_bytes: os.pread(file.fileno(), most_bytes, start)

    def lay(self, sha256: str, target: Path) -> None:
        os.link(self.path(sha256), target)

    def all(self) -> Iterator[Stored]:
        for file in self.blobs.glob("??/*"):
            if re.fullmatch("[0-9a-f]{64}", file.name):
                about = file.stat()
                yield Stored(file.name, about.st_size, about.st_mtime)

    def remove(self, blobs: Iterable[str]) -> None:
        for sha256 in blobs:
            self.path(sha256).unlink()


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
