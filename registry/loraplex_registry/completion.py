"""What a shell completes: names, versions and aliases out of the registry, and the script that teaches a shell to ask.

A key press waits for this: one page is looked at, a server has a second, and what goes wrong is no answer. Makes no
folder, and no schema in a database. click does the rest.
"""

import os
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol

import click
import httpx
from click.shell_completion import CompletionItem, get_completion_class

from .errors import RegistryError
from .finding import Finder
from .pages import Listing, Page, write_cursor
from .patience import Patience
from .postgres import PostgresDatabase
from .registry import CATALOG, Registry
from .remote import DATABASE, RemoteRegistry, open_registry
from .version import Version

SHOWN = 50
PATIENCE_SECONDS = 1.0
VARIABLE = "_REGISTRY_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
# bash takes a word apart at these before anybody is asked; no other way to complete within a reference is known.
BASH = 'COMP_WORDBREAKS="${COMP_WORDBREAKS//[:@]/}"\n'


class ReferenceType(click.ParamType):
    """A reference, or with ``bare`` a name alone: any text for now, completed from the registry."""

    name = "reference"

    def __init__(self, bare: bool = False) -> None:
        self.bare = bare

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        where = ctx.obj or ctx.find_root().params.get("registry")
        with suppress(RegistryError, OSError, ValueError):
            registry = _opened(where)
            if registry is not None:
                with closing(registry):
                    return [CompletionItem(word) for word in words(registry, incomplete, self.bare)]
        return []


class Names(Protocol):
    """What is asked of a registry: two kinds of pages."""

    def list_page(self, limit: int, cursor: str | None) -> Listing: ...

    def versions_page(self, name: str, limit: int) -> Page[Version]: ...

    def close(self) -> None: ...


class PostgresNames:
    """The names in a PostgreSQL catalog. To open it as a registry does would make a folder, and perhaps a schema."""

    def __init__(self, url: str) -> None:
        """Raises StoreUnavailable; connects to nothing yet."""
        self._database = PostgresDatabase(url, connect_seconds=2)  # the least that PostgreSQL's library takes
        self._finder = Finder(self._database.reading)

    def list_page(self, limit: int, cursor: str | None) -> Listing:
        return self._finder.newest(limit, cursor)

    def versions_page(self, name: str, limit: int) -> Page[Version]:
        return self._finder.versions(name, limit)

    def close(self) -> None:
        self._database.close()


def words(registry: Names, begun: str, bare: bool) -> list[str]:
    """At most SHOWN references that begin so. Raises RegistryError."""
    for sign, after in ((":", _versions), ("@", _aliases)):
        name, found, _ = begun.partition(sign)
        if found and not bare:
            known = (f"{name}{sign}{word}" for word in after(registry, name))
            return [word for word in known if word.startswith(begun)][:SHOWN]
    names = (version.name for version in registry.list_page(SHOWN, _just_before(begun)).data)
    return [name for name in names if name.startswith(begun)]


def script(shell: str) -> str:
    """What a shell reads to complete `registry`."""
    known = get_completion_class(shell)
    assert known  # click has all of SHELLS
    source = known(click.Command("registry"), {}, "registry", VARIABLE).source()
    return BASH + source if shell == "bash" else source


def _versions(registry: Names, name: str) -> Iterator[str]:
    return (str(version.number) for version in reversed(registry.versions_page(name, 1000).data))


def _aliases(registry: Names, name: str) -> Iterator[str]:
    return iter(registry.list_page(1, _just_before(name)).aliases.get(name, {}))


def _just_before(name: str) -> str | None:
    """The cursor after which a page of the list begins with a name, or with the first that begins so."""
    if not name or ord(name[-1]) == 0:
        return None
    return write_cursor("list", [name[:-1] + chr(ord(name[-1]) - 1) + "\U0010ffff"])


def _opened(where: str | None) -> Names | None:
    if where and where.startswith(("http://", "https://")):
        return RemoteRegistry(where, timeout=httpx.Timeout(PATIENCE_SECONDS), patience=Patience(0))
    if database := os.environ.get(DATABASE):
        return PostgresNames(database)
    root = Path(where).expanduser() if where else Registry.default_root()
    return open_registry(root) if (root / CATALOG).exists() else None
