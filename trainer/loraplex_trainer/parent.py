"""Finds the adapter a run continues from: a version in the registry, or a folder. Knows nothing of training."""

import os
from dataclasses import dataclass
from pathlib import Path

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidAdapter, InvalidReference, InvalidRequest, NotFound, StoreUnavailable
from loraplex_registry.reference import Reference
from loraplex_registry.registry import Registry
from loraplex_registry.remote import open_registry
from loraplex_registry.version import Version
from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError


@dataclass(frozen=True)
class Parent:
    """What the receipt says of the adapter before, and where its files are now."""

    name: str
    version: int | None  # None: a folder, which need never have been pushed
    digest: str
    folder: Path

    @property
    def record(self) -> dict[str, str | int | None]:
        return {"name": self.name, "version": self.version, "digest": self.digest}


def find_parent(config: RunConfig, base: BaseDescription, scratch: Path) -> Parent | None:
    """Finds `continue_from`, fetching a version's files into `scratch`.

    Raises ConfigError when it names nothing, or an adapter that is not one of this base.
    """
    if config.continue_from is None:
        return None
    folder = Path(config.continue_from)
    try:
        if (folder / "adapter_config.json").is_file():
            # Pushed to a registry of its own: checked, and named by the digest that a push elsewhere gives it too.
            with Registry(scratch / "registry") as registry:
                version = registry.push(config.name, folder, base=base)
            return Parent(folder.resolve().name, None, version.digest, folder)
        version, files = fetch_version(config.continue_from, config.registry, scratch / "parent")
    except (InvalidReference, InvalidRequest, InvalidAdapter, NotFound, StoreUnavailable) as error:
        raise ConfigError(f"continue_from: {config.continue_from!r}: {error}") from error
    if version.base.fingerprint not in (None, base.fingerprint):
        raise ConfigError(f"continue_from: {version} is an adapter of another base than {base.id}")
    return Parent(version.name, version.number, version.digest, files)


def fetch_version(ref: str, registry: str | None, into: Path) -> tuple[Version, Path]:
    """The version of a reference, and its files in the new folder `into`. Raises RegistryError."""
    reference, where = Reference.parse(ref), registry_of(registry)
    if "://" not in where and not Path(where).expanduser().is_dir():  # to open a folder would make it
        raise StoreUnavailable(f"no such folder, and no registry at {where}")
    with open_registry(where) as opened:
        version = opened.resolve(reference)
        return version, opened.fetch(version.digest, into)


def registry_of(where: str | None) -> str:
    """The registry that a run file or a command names, else the user's."""
    return where or os.environ.get("LORAPLEX_REGISTRY") or str(Registry.default_root())
