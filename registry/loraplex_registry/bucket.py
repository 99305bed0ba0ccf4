"""Blobs in an object store: S3 and what speaks like it, Google's, Azure's; through obstore, in bounded memory.

An object appears whole or not at all, and is named by its sha256 as in a folder, so that a folder of blobs can be
copied to a bucket as it is. Credentials are the environment's: nothing here reads, keeps or tells them.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from .errors import StoreUnavailable
from .places import Read, Stored

SCHEMES = ("s3", "gs", "az")
PART_BYTES, PARTS_AT_ONCE = 16 << 20, 4  # of an upload; more than one part is a multipart upload
PIECE_BYTES = 4 << 20  # of a download to a file
TIMEOUT, CONNECT_TIMEOUT = "60s", "5s"  # of one request, which carries a part or a piece
RETRIES: dict[str, Any] = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
LIBRARY = "an object store needs its library: pip install 'loraplex[object-store]'"


class Bucket:
    """`blobs/sha256/ab/<hex>` below a URL's prefix."""

    def __init__(self, url: str) -> None:
        """Asks for nothing yet. Raises StoreUnavailable when the URL, the library or the settings are not right."""
        if not re.fullmatch(rf"({'|'.join(SCHEMES)})://[\w.-]+(/[\w./-]*)?", url):
            scheme = re.match(r"[a-z0-9+]+://", url)
            told = f"begins with {scheme[0]}" if scheme and scheme[0][:-3] not in SCHEMES else "cannot be read"
            raise StoreUnavailable(f"the store's URL {told}, expected s3://bucket/prefix, or gs:// or az://")
        self.where = url.rstrip("/")
        try:
            import obstore  # here: most registries are folders, and do without it
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise StoreUnavailable(LIBRARY) from error
        self._obstore, self._errors = obstore, (BaseError, OSError)
        with self._one_clear_error():
            # Where AWS_ENDPOINT_URL says http://, it is meant, as for the AWS command.
            options: Any = {"timeout": TIMEOUT, "connect_timeout": CONNECT_TIMEOUT, "allow_http": True}
            self._store = from_url(self.where, client_options=options, retry_config=RETRIES)  # type: ignore[arg-type]

    def put(self, staged: Path, sha256: str) -> None:
        # Over one that is there, too: it may be damaged, and gc's grace counts from the last push.
        with self._one_clear_error():
            limits = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
            self._obstore.put(self._store, _key(sha256), staged, **limits)

    def share(self, uploaded: Path, sha256: str) -> None:
        """The push may come to another machine. A file that none claims is removed by gc, after its grace."""
        self.put(uploaded, sha256)

    def size(self, sha256: str) -> int:
        with self._one_clear_error(may_be_absent=True):
            return self._obstore.head(self._store, _key(sha256))["size"]

    @contextmanager
    def opened(self, sha256: str) -> Iterator[Read]:
        total_bytes = self.size(sha256)

        def read(start: int, most_bytes: int) -> bytes:
            length = min(most_bytes, total_bytes - start)
            if length <= 0:
                return b""
            with self._one_clear_error(may_be_absent=True):
                return bytes(self._obstore.get_range(self._store, _key(sha256), start=start, length=length))

        yield read

    def lay(self, sha256: str, target: Path) -> None:
        with self.opened(sha256) as read, target.open("xb") as file:
            while piece := read(file.tell(), PIECE_BYTES):
                file.write(piece)

    def all(self) -> Iterator[Stored]:
        with self._one_clear_error():
            for batch in self._obstore.list(self._store, "blobs/sha256"):
                for one in batch:
                    sha256 = one["path"].rpartition("/")[2]
                    if re.fullmatch("[0-9a-f]{64}", sha256) and one["path"] == _key(sha256):
                        yield Stored(sha256, one["size"], one["last_modified"].timestamp())

    def remove(self, blobs: Iterable[str]) -> None:
        with self._one_clear_error():
            self._obstore.delete(self._store, [_key(sha256) for sha256 in blobs])

    @contextmanager
    def _one_clear_error(self, may_be_absent: bool = False) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            if may_be_absent and isinstance(error, FileNotFoundError):
                raise
            told = " ".join(str(error).partition("\n\nDebug source:")[0].split())
            raise StoreUnavailable(f"the store {self.where} cannot be used: {told}") from error


def _key(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"
