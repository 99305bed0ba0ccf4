"""Watches the registry: where aliases point, what was pushed, whether it answers, how old our knowledge is.

Knows no HTTP and no torch, and of the server only which names it holds.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Protocol

from loraplex_registry.errors import NotFound, RegistryError
from loraplex_registry.reference import Reference
from loraplex_registry.version import Version
from loraplex_server.adapters.disk import AdapterSource

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
ROUND = 5  # looks in which every name that is held is asked about: a list of all could be thousands


class RegistrySource(AdapterSource, Protocol):
    """What the server asks of a registry, in a folder or behind a URL."""

    def resolve(self, ref: str | Reference) -> Version: ...
    def versions(self, name: str) -> list[Version]: ...
    def list(self) -> list[Version]: ...
    def aliases(self) -> dict[str, dict[str, int]]: ...


class RegistryWatch:
    """Asks for the aliases every second on a thread of its own.

    When an alias moves, or a version is pushed to a name that is ``held``, ``ahead`` is called with the version that is
    served now or may be next, so that it can be loaded before the first request wants it. ``gone`` is called with a
    held name that the registry knows no more.
    """

    def __init__(
        self,
        registry: RegistrySource,
        ahead: Callable[[Version], None],
        held: Callable[[], Iterable[str]] = tuple,
        gone: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._registry = registry
        self._ahead, self._held, self._gone = ahead, held, gone
        self._newest: dict[str, int] = {}  # of the names that are held, as last seen
        self._round: list[str] = []  # names still to be asked about in this one
        self._aliases: dict[str, dict[str, int]] | None = None
        self._seen_at: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry-watch", daemon=True)
        self.up = False

    @property
    def ready(self) -> bool:
        """Whether the registry has answered at least once."""
        return self._seen_at is not None

    @property
    def lag_seconds(self) -> float | None:
        """Age of what we know, or None before the first answer."""
        return None if self._seen_at is None else monotonic() - self._seen_at

    def start(self) -> None:
        """Take a first look, then go on in the background."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """One look at the aliases; a registry that does not answer is noted, and what we know stays.

        Whatever else goes wrong is logged with its trace: the watch must outlive it.
        """
        try:
            aliases = self._registry.aliases()
            before, self._aliases = self._aliases, aliases
            if before is not None:
                self._tell(before, aliases)
            self._look_for_pushes()
        except RegistryError as error:
            if self.up:
                log.warning("the registry does not answer: %s", error)
            self.up = False
        except Exception:
            log.exception("a look at the registry failed")
            self.up = False
        else:
            self.up, self._seen_at = True, monotonic()

    def _tell(self, before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> None:
        for name, aliases in now.items():
            for alias, number in aliases.items():
                if before.get(name, {}).get(alias) not in (None, number):
                    self._ahead(self._registry.resolve(f"{name}:{number}"))

    def _look_for_pushes(self) -> None:
        """Ask about some of the names that are held, so that a round of looks asks about all."""
        held = sorted(self._held())
        self._newest = {name: number for name, number in self._newest.items() if name in held}
        self._round = [name for name in self._round if name in held] or held
        for name in self._round[: -(-len(held) // ROUND)]:
            self._round = self._round[1:]
            try:
                newest = self._registry.versions(name)[-1]
            except NotFound:
                self._gone(name)
                continue
            before = self._newest.get(name, newest.number)
            self._newest[name] = newest.number
            if newest.number > before:
                self._ahead(newest)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()
