"""What a shell completes: names, versions and aliases out of the registry, and the script that teaches a shell to ask.

A key press waits for this: one page is looked at, a server has a second, and what goes wrong is no answer. Makes no
folder. click does the rest.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import httpx
from click.shell_completion import CompletionItem, get_completion_class

from .errors import RegistryError
from .pages import write_cursor
from .patience import Patience
from .registry import CATALOG, Registry
from .remote import RemoteRegistry, open_registry

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
                with registry:
                    return [CompletionItem(word) for word in words(registry, incomplete, self.bare)]
        return []


def words(registry: Registry | RemoteRegistry, begun: str, bare: bool) -> list[str]:
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


def _versions(registry: Registry | RemoteRegistry, name: str) -> Iterator[str]:
    return (str(version.number) for version in reversed(registry.versions_page(name, 1000).data))


def _aliases(registry: Registry | RemoteRegistry, name: str) -> Iterator[str]:
    return iter(registry.list_page(1, _just_before(name)).aliases.get(name, {}))


def _just_before(name: str) -> str | None:
    """The cursor after which a page of the list begins with a name, or with the first that begins so."""
    if not name or ord(name[-1]) == 0:
        return None
    return write_cursor("list", [name[:-1] + chr(ord(name[-1]) - 1) + "\U0010ffff"])


def _opened(where: str | None) -> Registry | RemoteRegistry | None:
    if where and where.startswith(("http://", "https://")):
        return RemoteRegistry(where, timeout=httpx.Timeout(PATIENCE_SECONDS), patience=Patience(0))
    root = Path(where).expanduser() if where else Registry.default_root()
    return open_registry(root) if (root / CATALOG).exists() else None
