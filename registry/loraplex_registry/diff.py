"""Two versions side by side: what is said of them, and how far apart what they add to the base is.

Reads weights with numpy, one module at a time. Knows a registry only as something that fetches by digest.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .adapter_config import of_module
from .fit import DTYPES, MODULE_KEY
from .manifest import Manifest
from .tensors import TensorInfo, mapped, read_header
from .validate import WEIGHTS
from .version import Version

Factors = tuple[np.ndarray, np.ndarray]  # B (outputs, rank), A (rank, inputs)


@dataclass(frozen=True)
class Change:
    """Something that is said of both versions, and not the same; None where it is not said."""

    what: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Update:
    """What each version adds to one module's weight, ΔW = scaling B A: Frobenius norms (None: it adds nothing to
    this module), and the cosine between the two, where both add something of one shape."""

    module: str
    before: float | None
    after: float | None
    cosine: float | None


@dataclass(frozen=True)
class Diff:
    """`updates` are in the order of the modules' names, and empty when both have the same weights and configuration."""

    before: str
    after: str
    changes: tuple[Change, ...]
    updates: tuple[Update, ...]


class Source(Protocol):
    """A registry, in a folder or behind a URL."""

    def resolve(self, ref: str) -> Version: ...
    def manifest(self, digest: str) -> Manifest: ...
    def fetch(self, digest: str, into: str | Path) -> Path: ...


def compare(registry: Source, before: str, after: str) -> Diff:
    """What is not the same in two versions. Raises InvalidReference, NotFound, CorruptBlob."""
    versions = [registry.resolve(ref) for ref in (before, after)]
    manifests = [registry.manifest(version.digest) for version in versions]
    one, other = (dict(_said(*pair)) for pair in zip(versions, manifests, strict=True))
    keys = [*one, *(key for key in other if key not in one)]
    changes = tuple(
        Change(key, one.get(key), other.get(key)) for key in keys if _plain(one.get(key)) != _plain(other.get(key))
    )
    updates: tuple[Update, ...] = ()
    if any(change.what == WEIGHTS or change.what.startswith("config.") for change in changes):
        with tempfile.TemporaryDirectory() as folder:
            places = [registry.fetch(version.digest, Path(folder, str(i))) for i, version in enumerate(versions)]
            updates = tuple(_updates(places, [manifest.config for manifest in manifests]))
    return Diff(str(versions[0]), str(versions[1]), changes, updates)


def _said(version: Version, manifest: Manifest) -> Iterator[tuple[str, Any]]:
    yield "digest", version.digest
    for key in ("id", "revision", "fingerprint", "quantization"):
        yield f"base.{key}", getattr(version.base, key)
    yield "rank", version.rank
    yield "targets", version.targets
    yield "bytes", version.bytes
    for key, value in manifest.config.items():
        yield f"config.{key}", value
    for key, value in version.metrics.items():
        yield f"metrics.{key}", value
    yield "parent", version.parent
    for entry in manifest.files:
        yield entry.path, f"sha256:{entry.sha256}"


def _plain(value: Any) -> Any:
    """peft writes sets as lists, in any order."""
    return sorted(map(str, value)) if isinstance(value, list | tuple) else value


def _updates(folders: Sequence[Path], configs: Sequence[dict[str, Any]]) -> Iterator[Update]:
    parts = [_modules(read_header(folder / WEIGHTS)) for folder in folders]
    with mapped(folders[0] / WEIGHTS) as before, mapped(folders[1] / WEIGHTS) as after:
        for module in sorted({*parts[0], *parts[1]}):
            one, other = (
                _factors(view, own[module], module, config) if module in own else None
                for view, own, config in zip((before, after), parts, configs, strict=True)
            )
            yield Update(module, _norm(one), _norm(other), _cosine(one, other))


def _modules(header: dict[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The two matrices of each module, as "A" and "B", and an embedding's too; biases are left out."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.items():
        if (match := MODULE_KEY.fullmatch(key)) and not match["part"].endswith("bias"):
            found.setdefault(match["module"], {})[match["part"].removesuffix(".weight")[-1]] = info
    return found


def _factors(view: memoryview, parts: dict[str, TensorInfo], module: str, config: dict[str, Any]) -> Factors:
    a, b = _values(view, parts["A"]), _values(view, parts["B"])
    rank = a.shape[0]
    alpha = of_module(config, "alpha_pattern", "lora_alpha", module)
    return b * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)), a


def _values(view: memoryview, info: TensorInfo) -> np.ndarray:
    with view[info.begin : info.end] as data:
        stored = np.frombuffer(data, DTYPES[info.dtype])
        if info.dtype == "BF16":  # the upper half of a float32
            return (stored.astype("<u4") << 16).view("<f4").reshape(info.shape)
        return stored.astype("<f4").reshape(info.shape)


def _inner(one: Factors, other: Factors) -> float:
    """Sum of the products of B A's and B' A's entries, through matrices of rank by rank."""
    (b, a), (b2, a2) = one, other
    return float(np.sum((b.T @ b2).astype("f8") * (a @ a2.T)))


def _norm(factors: Factors | None) -> float | None:
    return math.sqrt(max(_inner(factors, factors), 0.0)) if factors else None


def _cosine(one: Factors | None, other: Factors | None) -> float | None:
    if not one or not other or (len(one[0]), one[1].shape[1]) != (len(other[0]), other[1].shape[1]):
        return None
    norms = math.sqrt(_inner(one, one) * _inner(other, other))
    return _inner(one, other) / norms if norms else None
