"""An adapter that a command is given, by reference or as a folder: its files, and the base as it was trained on.

Knows registries and receipts; does nothing with either.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_registry.adapter_config import CONFIG, read_config
from loraplex_registry.errors import RegistryError
from loraplex_registry.receipt import Receipt
from loraplex_registry.tensors import read_header
from loraplex_registry.validate import WEIGHTS
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.parent import fetch_version

if TYPE_CHECKING:  # it imports torch
    from loraplex_server.engine.model import Base


@dataclass(frozen=True)
class Found:
    """`base` is a folder or a Hub id, `quantization` what `Base.quantization` was; `digest` None: it is a folder."""

    name: str
    digest: str | None
    folder: Path
    config: dict[str, Any]  # of adapter_config.json
    receipt: Receipt
    base: str
    revision: str | None
    fingerprint: str | None
    quantization: str

    def changes(self, *modules: str) -> bool:
        """Whether the adapter has a tensor for a module of one of these names."""
        names = {name for key in read_header(self.folder / WEIGHTS) for name in key.split(".")}
        return bool(names & set(modules))

    def load_base(self, device: str) -> "Base":
        """The base as it was in training. Raises ConfigError for another one, EngineError for one that is not there."""
        from loraplex_server.engine.model import load_base

        scheme, _, dtype = self.quantization.partition(":")
        name, plus, _ = scheme.partition("+")
        if plus and scheme not in ("nf4+double", "fp4+double"):
            raise ConfigError(
                f"--quantization {self.quantization}: expected nf4, nf4+double, fp4, fp4+double, int8 or none, and "
                "a dtype after a colon unless it is auto"
            )
        is_double = bool(plus) or not dtype or name not in ("nf4", "fp4")  # a bare nf4 is what everybody means by it
        base = load_base(self.base, self.revision, name, device, dtype or "auto", double_quantization=is_double)
        if self.fingerprint not in (None, base.fingerprint):
            raise ConfigError(
                f"--base {self.base}: its fingerprint is {base.fingerprint}, and {self.name} was trained on "
                f"{self.fingerprint}"
            )
        return base


@contextmanager
def find_adapter(ref: str, registry: str | None, base: str | None, quantization: str | None) -> Iterator[Found]:
    """The adapter, for as long as the context is. What is given comes before what the adapter says of itself.

    Raises ConfigError when there is none, or when it does not say what it was trained on.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder, version = Path(ref), None
            if not (folder / CONFIG).is_file():
                version, folder = fetch_version(ref, registry, Path(scratch) / "adapter")
            config, receipt = read_config(folder), Receipt.read(folder)
            if not (folder / WEIGHTS).is_file():
                raise ValueError(f"{WEIGHTS} is missing")
            read_header(folder / WEIGHTS)
        except (RegistryError, ValueError) as error:
            raise ConfigError(f"{ref}: {error}") from error
        theirs = version.base if version else receipt.base
        named = base or _base_of(receipt, config)
        if not named:
            raise ConfigError(f"{ref}: the adapter does not say which base it belongs to; name it with --base")
        scheme = quantization or (theirs.quantization if theirs else None)
        if not scheme:
            raise ConfigError(
                f"{ref}: the adapter does not say on which quantization it was trained; say it with --quantization"
            )
        yield Found(
            name=str(version or folder.resolve().name),
            digest=version.digest if version else None,
            folder=folder,
            config=config,
            receipt=receipt,
            base=named,
            revision=None if base or not theirs or Path(named).is_dir() else theirs.revision,
            fingerprint=theirs.fingerprint if theirs else None,
            quantization=scheme,
        )


def _base_of(receipt: Receipt, config: dict[str, Any]) -> str | None:
    """Where the base lay in training, if it lies there still; else its name."""
    if receipt.base_path and Path(receipt.base_path).is_dir():
        return receipt.base_path
    return receipt.base.id if receipt.base else config.get("base_model_name_or_path")
