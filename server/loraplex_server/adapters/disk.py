"""Fetches an adapter version from the registry to a folder for as long as it takes to read it.

The registry verifies every byte on the way; nothing stays on disk that could go stale.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from loraplex_registry.base import BaseDescription
from loraplex_server.adapters.host import HostAdapter, read_adapter


class AdapterSource(Protocol):
    """What the server asks of a registry to get an adapter's files."""

    def fetch(self, digest: str, into: Path) -> Path:
        """Write the verified files of the version into a folder and return it."""
        ...


def loader(source: AdapterSource, base: BaseDescription, max_rank: int) -> Callable[[str], HostAdapter]:
    """A function from digest to host memory, by way of a temporary folder. It raises what fetch and read raise."""

    def load(digest: str) -> HostAdapter:
        with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
            return read_adapter(digest, source.fetch(digest, Path(folder) / "adapter"), base, max_rank)

    return load
