"""What an adapter version is made of: files by sha256, the base it belongs to, its LoRA configuration.

The digest of the canonical bytes is the version's identity. Knows nothing of folders, stores or base models.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import InvalidManifest

FORMAT = "loraplex.adapter/1"
CHUNK_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an adapter: relative POSIX path, lowercase hex sha256, size in bytes."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if not all(parts) or any(p.startswith(".") for p in parts) or not self.path.isprintable() or "\\" in self.path:
            raise InvalidManifest(f"file path {self.path!r}: expected a relative path without hidden or '..' parts")
        if len(self.path) > 255:
            raise InvalidManifest(f"file path {self.path[:40]!r}…: more than 255 characters")
        if not SHA256.fullmatch(self.sha256):
            raise InvalidManifest(f"file {self.path}: sha256 {self.sha256!r} is not 64 hex digits")
        if type(self.bytes) is not int or self.bytes < 0:
            raise InvalidManifest(f"file {self.path}: bytes {self.bytes!r} is not a size")

    @classmethod
    def of(cls, file: Path, path: str) -> "FileEntry":
        """Hash the file on disk."""
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
            return cls(path, digest.hexdigest(), stream.tell())


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base an adapter belongs to. `fingerprint` is over its weights; `quantization` is how it was trained on."""

    id: str
    revision: str | None = None
    fingerprint: str | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class Manifest:
    """An adapter version's content. `config` is the content of adapter_config.json."""

    files: tuple[FileEntry, ...]
    base: BaseRef
    config: dict[str, Any]

    def canonical(self) -> bytes:
        """The bytes that are hashed: compact JSON, keys and files sorted, so that equal content gives equal bytes."""
        files = [asdict(entry) for entry in sorted(self.files, key=lambda entry: entry.path)]
        body = {"format": FORMAT, "files": files, "base": asdict(self.base), "config": self.config}
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @cached_property
    def digest(self) -> str:
        return sha256_of(self.canonical())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read what `canonical` wrote. Raises InvalidManifest."""
        try:
            body = json.loads(data)
            if body["format"] != FORMAT:
                raise InvalidManifest(f"manifest format {body['format']!r}: expected {FORMAT!r}")
            files = tuple(FileEntry(**entry) for entry in body["files"])
            return cls(files, BaseRef(**body["base"]), dict(body["config"]))
        except InvalidManifest:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidManifest(f"not a manifest: {error}") from error


def sha256_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
