"""Fetches an adapter version from the registry to a folder for as long as it takes to read it.

The registry verifies every byte on the way; nothing stays on disk that could go stale.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidKey, NotSigned
from loraplex_registry.manifest import Manifest
from loraplex_registry.signing import PublicKey, Signature, check_signed
from loraplex_server.engine.errors import AdapterRefused


class SignatureSource(Protocol):
    """What a registry says of who signed what."""

    def of(self, digest: str) -> list[Signature]:
        """The version's signatures, still to be checked."""
        ...


class AdapterSource(Protocol):
    """What the server asks of a registry to get an adapter's files."""

    @property
    def signatures(self) -> SignatureSource:
        """Who signed what."""
        ...

    def manifest(self, digest: str) -> Manifest:
        """What the version is made of, and the base it was checked against."""
        ...

    def fetch(self, digest: str, into: Path) -> Path:
        """Write the verified files of the version into a folder and return it."""
        ...


def folders(
    source: AdapterSource, base: BaseDescription, signed_by: Sequence[PublicKey] = ()
) -> Callable[[str], AbstractContextManager[Path]]:
    """A function from digest to a folder with the version's files, which is there for as long as the context is.

    It raises what manifest and fetch raise, and AdapterRefused for a version of another base: two bases of one shape
    are told apart by the fingerprint of their weights. With keys in ``signed_by`` also for a version that none of them
    has signed.
    """

    @contextmanager
    def fetched(digest: str) -> Iterator[Path]:
        if signed_by:
            try:
                check_signed("it", digest, source.signatures.of(digest), signed_by)
            except (NotSigned, InvalidKey) as error:
                raise AdapterRefused(str(error)) from error
        theirs = source.manifest(digest).base
        if theirs.fingerprint and base.fingerprint and theirs.fingerprint != base.fingerprint:
            raise AdapterRefused(
                f"it belongs to base {theirs.id}, fingerprint {theirs.fingerprint}; "
                f"this server has base {base.id}, fingerprint {base.fingerprint}"
            )
        with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
            yield source.fetch(digest, Path(folder) / "adapter")

    return fetched
