"""Watches the registry: which aliases point where, whether it answers, how old our knowledge is. No HTTP, no torch."""

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from loraplex_registry.errors import RegistryError
from loraplex_registry.reference import Reference
from loraplex_registry.version import Version
from loraplex_server.adapters.disk import AdapterSource

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class RegistrySource(AdapterSource, Protocol):
    """What the server asks of a registry, in a folder or behind a URL."""

    def resolve(self, ref: str | Reference) -> Version: ...
    def list(self) -> list[Version]: ...
    def aliases(self) -> dict[str, dict[str, int]]: ...


class RegistryWatch:
    """Asks for the aliases every second on a thread of its own.

    When an alias moves, ``moved`` is called with the version it points to now, so that it can be loaded before the
    first request wants it.
    """

    def __init__(self, registry: RegistrySource, moved: Callable[[Version], None]) -> None:
        self._registry = registry
        self._moved = moved
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
                    self._moved(self._registry.resolve(f"{name}:{number}"))

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()
