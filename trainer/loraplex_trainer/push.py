"""Takes saves to a registry while the run goes on: a queue of complete adapters on disk, and a thread that empties it.

Owns the folder `<output>/.<name>.push`: what waits there outlives the process, and the next run takes it along. Knows
registries, not training.
"""

import os
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import MissingBlobs, RegistryError
from loraplex_registry.receipt import Receipt
from loraplex_registry.remote import open_registry
from loraplex_trainer.checkpoint import swap_in
from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError, NotPushed
from loraplex_trainer.parent import registry_of
from loraplex_trainer.progress import say

DRAFT, FINAL = "draft", "final"
LONGEST_PAUSE_SECONDS = 5.0  # between two tries at a registry that does not answer


def every_steps(every: str, save_every: int | str) -> int | str | None:
    """So many steps, or "epoch", lie between two drafts; None: there are none."""
    return {"save": save_every, "epoch": "epoch"}.get(every)


def check_registry(config: RunConfig) -> None:
    """Raises ConfigError where nothing can be pushed to; a server that is away may come back. Writes nothing."""
    if config.push.every == "never":
        return
    where = registry_of(config.push.registry or config.registry)
    if "://" in where:
        try:
            open_registry(where).close()  # asks the server nothing
        except RegistryError as error:
            raise ConfigError(f"push.registry: {error}") from error
        return
    folder = Path(where).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())  # what is not there yet is made in it
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"push.registry: {where!r}: expected a folder to write in, or a URL: {there} is none")


class Pushes:
    """The pushes of one run; nothing happens where `push.every` is `never`. Used as a context: its end ends the thread.

    Each save is pushed in its turn, tagged `draft` or `final` and `step-N`. Trouble with the registry is met by trying
    again, for as long as the run goes on; what the registry refuses stays in the queue and is told at the end.
    """

    def __init__(self, config: RunConfig, console: Console) -> None:
        wanted = config.push
        self.every = wanted.every
        self.folder = config.folder.with_name(f".{config.folder.name}.push")
        self._name = wanted.name or config.name
        self._where = registry_of(wanted.registry or config.registry)
        self._wait_seconds = wanted.wait_seconds
        self._adapter_folder, self._console = config.folder, console
        self._base: BaseDescription | None = None
        self._refused: dict[Path, Exception] = {}
        self._trouble: Exception | None = None  # the latest, while the registry does not answer
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._no_more = False
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._wake.set()
        if kind and (waiting := self._waiting()):
            say(
                self._console, f"{len(waiting)} saves wait to be pushed in {self.folder}; the next run takes them along"
            )

    def start(self, base: BaseDescription) -> None:
        """Begin with what an earlier run left; `base` is what the saves belong to."""
        if self.every == "never":
            return
        self._base = base
        for unfinished in self.folder.glob("*.partial"):
            shutil.rmtree(unfinished)
        self._thread.start()

    def add(self, kind: str, step: int, write: Callable[[Path], object]) -> None:
        """Queue what `write` puts into the folder it is given: a complete adapter."""
        if self.every == "never":
            return
        number = 1 + max((int(path.name.partition("-")[0]) for path in self._waiting()), default=0)
        place = self.folder / f"{number:06d}-{kind}-step-{step}"
        partial = place.with_name(f"{place.name}.partial")
        partial.mkdir(parents=True)
        write(partial)
        swap_in(partial, place)
        self._wake.set()

    def finish(self) -> None:
        """Wait until the queue is empty, at most `push.wait_seconds`. Raises NotPushed, which says how to go on."""
        if self.every == "never":
            return
        self._no_more = True
        self._wake.set()
        self._thread.join(self._wait_seconds)
        left = self._waiting()
        if not left:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        why = next((self._refused[path] for path in left if path in self._refused), self._trouble)
        what = f"{len(left)} saves were not pushed to {self._where} ({why or 'not within push.wait_seconds'})"
        how = " && ".join(self._command(path) for path in left)
        raise NotPushed(f"the adapter is complete in {self._adapter_folder}, but {what}; push them with: {how}")

    def _waiting(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if not path.name.endswith(".partial"))

    def _run(self) -> None:
        pause = 0.5
        while not self._stopped.is_set():
            todo = [path for path in self._waiting() if path not in self._refused]
            if todo and self._pushed(todo[0]):
                pause = 0.5
            elif todo:
                self._stopped.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            elif self._no_more:
                return
            else:
                self._wake.wait()
                self._wake.clear()

    def _pushed(self, path: Path) -> bool:
        """One try; False where another may help."""
        try:
            base = Receipt.read(path).base
            ours = base and self._base and base.fingerprint == self._base.fingerprint
            with open_registry(self._where) as registry:
                message = f"{path.name.partition('-')[2].replace('-', ' ')} of a run"
                version = registry.push(self._name, path, base=self._base if ours else None, message=message)
                registry.tag(str(version), _tags(path))
        except (RegistryError, OSError) as error:
            if _may_pass(error):
                if self._trouble is None:
                    say(self._console, f"push: {error}; trying again while the run goes on")
                self._trouble = error
                return False
            self._refused[path] = error
            say(self._console, f"push: {path.name} is not taken: {error}")
            return True
        self._trouble = None
        say(self._console, f"pushed {version} ({', '.join(_tags(path))})")
        shutil.rmtree(path)
        return True

    def _command(self, path: Path) -> str:
        tags = [part for tag in _tags(path) for part in ("--tag", tag)]
        return shlex.join(["registry", "push", self._name, str(path), *tags, "--registry", self._where])


def _tags(path: Path) -> list[str]:
    _, kind, step = path.name.split("-", 2)
    return [kind, step]


def _may_pass(error: Exception) -> bool:
    """Whether the same may work later: the registry is away, its disk full; not where it said no."""
    return isinstance(error, OSError | MissingBlobs) and not isinstance(error, PermissionError | FileNotFoundError)
