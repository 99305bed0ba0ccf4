"""The bases that a server checks uploads against: those its operator names, and those in its own Hub cache.

An upload says which base it belongs to in words of the uploader's. They are looked up here and never opened: no path
that a caller wrote is read, and nothing is fetched.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Self

from .adapter_config import CONFIG, read_config
from .base import BaseDescription, describe_base, describe_cached_base
from .errors import BaseNotFound, InvalidRequest
from .receipt import RECEIPT, Receipt


@dataclass(frozen=True)
class TrustedBases:
    """What each word stands for. Without any, only the Hub cache is asked."""

    named: tuple[tuple[str, BaseDescription], ...] = ()

    @classmethod
    def describe(cls, given: Sequence[str]) -> Self:
        """Read the bases: each `ID`, `PATH`, or `ID=PATH` for a folder that is called otherwise than the base.

        A folder is known by its name too. Raises BaseNotFound; InvalidRequest when one word stands for two bases.
        """
        named: dict[str, BaseDescription] = {}
        for word in given:
            found_id, _, path = word.partition("=")
            if Path(word).is_dir():
                found_id, path = Path(word).resolve().name, word
            # Under its name alone: where it lies here is nothing that an uploader is told.
            description = replace(describe_base(path), id=found_id) if found_id and path else describe_base(word)
            for name in {word, found_id} if path == word else {description.id}:
                if named.setdefault(name, description).shapes != description.shapes or (
                    named[name].fingerprint != description.fingerprint
                ):
                    raise InvalidRequest(f"--base: two bases are called '{name}'; give ID=PATH for one of them", "base")
        return cls(tuple(named.items()))

    def find(self, folder: Path, ids_of: Callable[[str], Iterable[str]]) -> BaseDescription:
        """The base that the adapter in a folder names.

        By its receipt's fingerprint, by name, by what versions call a trusted base (`ids_of` a fingerprint), or by the
        last part of a path. Raises BaseNotFound, InvalidAdapter.
        """
        receipt, config = Receipt.read(folder), read_config(folder)
        trained = receipt.base
        if trained and trained.fingerprint:
            for _, base in self.named:
                if base.fingerprint == trained.fingerprint:
                    return base
        wanted = trained.id if trained else config.get("base_model_name_or_path")
        revision = trained.revision if trained else config.get("revision")
        if not isinstance(wanted, str) or not wanted:
            raise BaseNotFound(
                f"the files do not say which base they belong to: {CONFIG} has base_model_name_or_path {wanted!r}, "
                f"expected a base's id, and there is no {RECEIPT} that has one"
            )
        names = dict(self.named)
        if wanted in names:
            return names[wanted]
        for base in names.values():
            if base.fingerprint and wanted in ids_of(base.fingerprint):
                return base
        if _is_path(wanted) and PurePath(wanted).name in names:
            return names[PurePath(wanted).name]
        cached = None if _is_path(wanted) else describe_cached_base(wanted, revision)
        if cached is None:
            ids = sorted({base.id for base in names.values()})
            trusted = f"trusted are {', '.join(ids)}" if ids else "none is named"
            raise BaseNotFound(
                f"the base '{wanted}' is neither among those that the registry trusts ({trusted}) nor whole in its Hub "
                f"cache; name it where the registry runs: --base {wanted}, or --base {wanted}=FOLDER"
            )
        return cached


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") != 1
