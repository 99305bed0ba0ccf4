"""What is known of the versions behind digests, for as long as it is wanted. Knows no registry and no engine."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from threading import Lock

from loraplex_registry.version import Version


class KnownVersions:
    """Versions by digest: those that are ``resident``, and of the others the last ``recent`` that were resolved.

    Safe from any thread: versions are resolved on many.
    """

    def __init__(self, recent: int, resident: Callable[[], Collection[str]]) -> None:
        self._recent, self._resident = recent, resident
        self._versions: OrderedDict[str, Version] = OrderedDict()  # the last resolved comes last
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._versions)

    def remember(self, version: Version) -> None:
        """It was resolved just now."""
        with self._lock:
            self._versions[version.digest] = version
            self._versions.move_to_end(version.digest)
            if len(self._versions) > self._recent:
                self._trim()

    def names(self, digests: Iterable[str]) -> tuple[str, ...]:
        """The names of those that are known, each once, sorted."""
        return tuple(sorted({version.name for version in self.of(digests)}))

    def of(self, digests: Iterable[str]) -> list[Version]:
        """Those of the digests that are known."""
        with self._lock:
            return [self._versions[digest] for digest in digests if digest in self._versions]

    def has(self, name: str) -> bool:
        """Whether a version of this name is known."""
        with self._lock:
            return any(version.name == name for version in self._versions.values())

    def _trim(self) -> None:
        resident = set(self._resident())
        others = [digest for digest in self._versions if digest not in resident]
        for digest in others[: len(others) - self._recent] if len(others) > self._recent else ():
            del self._versions[digest]
