"""Versions in one file, from one registry to another: a plain tar of an index and of blobs named by their sha256.

Nothing in the file is trusted: names, sizes and bytes are proven as they are read, and every version is checked
against its base as at any push. Knows a registry only by its verbs.
"""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .base import describe_base
from .blobs import Progress, silent, write_durably
from .errors import InvalidAdapter, InvalidArchive, InvalidReference, InvalidRequest, RegistryError
from .manifest import CHUNK_BYTES, SHA256, Manifest
from .places import sync_folder
from .reference import check_digest, check_name, check_tag
from .registry import MANIFEST, Registry, base_ref, find_base
from .remote import RemoteRegistry
from .signing import holds
from .validate import Limits, check_adapter
from .version import Version
from .wire import dump, load

FORMAT = "loraplex.export/1"
INDEX = "index.json"
INDEX_BYTES = 32 << 20
BLOBS = "blobs/sha256/"
AnyRegistry = Registry | RemoteRegistry


@dataclass(frozen=True)
class SignatureEntry:
    """One signature of a version: public key and signature, as base64."""

    key: str
    signature: str


@dataclass(frozen=True)
class Entry:
    """One version, as the index names it."""

    name: str
    number: int
    digest: str
    message: str
    signatures: tuple[SignatureEntry, ...] = ()
    tags: tuple[str, ...] = ()  # files of before tags travelled have none


@dataclass(frozen=True)
class Index:
    """What the file begins with: its format, and the versions by name and number."""

    format: str
    versions: tuple[Entry, ...]


def export_versions(
    registry: AnyRegistry, refs: Sequence[str], file: Path, progress: Progress = silent
) -> list[Version]:
    """Write versions to a new file, all or nothing; a blob that several share is in it once.

    Raises InvalidReference, NotFound, CorruptBlob, FileExistsError.
    """
    if file.exists():
        raise FileExistsError(f"'{file}' is there already; name a new file")
    found = {(version.name, version.number): version for version in map(registry.resolve, refs)}
    versions = [found[key] for key in sorted(found)]
    index = Index(FORMAT, tuple(_entry(registry, version) for version in versions))
    with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=f".{file.name}.") as temporary:
        partial = Path(temporary) / "tar"
        with partial.open("xb") as stream:
            with tarfile.open(fileobj=stream, mode="w") as tar:
                _add(tar, INDEX, json.dumps(dump(Index, index), ensure_ascii=False).encode())
                for version in versions:
                    _add_version(tar, registry, version, temporary, progress)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
        sync_folder(file.absolute().parent)
    return versions


def import_versions(
    registry: AnyRegistry,
    file: Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    progress: Progress = silent,
) -> Iterator[Version]:
    """Push what a file holds, in the order of its versions' numbers; each as soon as it was pushed.

    ``name`` is the name to keep them under, if they are of one. Every version gets the digest that it had, or is
    refused; it gets the next number of its name. Signatures and tags come along, aliases are not moved. What else is
    told of a version (card, metrics, lineage) is told by its files. Raises InvalidArchive, and what push raises.
    """
    with tempfile.TemporaryDirectory() as temporary:
        blobs = Path(temporary) / "blobs"
        index = _unpack(file, blobs, registry.limits, progress)
        names = {entry.name for entry in index.versions}
        if name and len(names) > 1:
            raise InvalidRequest(f"'{file}' holds {', '.join(sorted(names))}: one name cannot stand for all", "as")
        for number, entry in enumerate(index.versions):
            folder = Path(temporary) / str(number)
            manifest = _lay_out(entry, blobs, folder)
            description = describe_base(base) if base else find_base(folder, None)
            own = description.fingerprint or manifest.base.fingerprint
            if manifest.base.fingerprint and own != manifest.base.fingerprint:
                raise InvalidAdapter(
                    f"{entry.name}:{entry.number} was checked against base {manifest.base.id} fingerprint "
                    f"{manifest.base.fingerprint}, given base {description.id} fingerprint {own}"
                )
            # The base may have another path here, and its weights may not be here to compare.
            description = replace(description, id=manifest.base.id, revision=manifest.base.revision, fingerprint=own)
            checked = check_adapter(folder, description, registry.limits)
            digest = Manifest(checked.files, base_ref(checked, description), checked.config).digest
            _check_told(entry, file)  # before there is a version: none is half imported
            if digest != entry.digest:
                raise InvalidArchive(f"'{file}': {entry.name}:{entry.number} would become {digest}, not {entry.digest}")
            version = registry.push(check_name(name or entry.name), folder, base=description, message=entry.message)
            for one in entry.signatures:
                registry.signatures.add(version.digest, one.key, one.signature)
            if not set(entry.tags) <= set(version.tags):
                tags = registry.tag(str(version), add=entry.tags).tags
                version = replace(version, tags=tags)
            yield version


def _entry(registry: AnyRegistry, version: Version) -> Entry:
    signed = [SignatureEntry(one.key, one.signature) for one in registry.signatures.of(version.digest)]
    by_key = tuple(sorted(signed, key=lambda one: one.key))  # in whichever order they were made
    return Entry(version.name, version.number, version.digest, version.message, by_key, version.tags)


def _check_told(entry: Entry, file: Path) -> None:
    """What is told of a version beside its files. Raises InvalidArchive."""
    what = f"{entry.name}:{entry.number}"
    for one in entry.signatures:
        if not holds(entry.digest, one.key, one.signature):
            raise InvalidArchive(f"'{file}': a signature of {what} is not its key's")
    for tag in entry.tags:
        try:
            check_tag(tag)
        except InvalidReference as error:
            raise InvalidArchive(f"'{file}': {what}: {error}") from error


def _add_version(
    tar: tarfile.TarFile, registry: AnyRegistry, version: Version, folder: str, progress: Progress
) -> None:
    manifest, known = registry.manifest(version.digest), set(tar.getnames())
    if (member := BLOBS + version.digest.removeprefix("sha256:")) not in known:
        _add(tar, member, manifest.canonical())
    with tempfile.TemporaryDirectory(dir=folder) as own:
        content = registry.fetch(version.digest, Path(own) / "files")
        for entry in manifest.files:
            progress(entry.bytes)
            if (member := BLOBS + entry.sha256) not in known:
                known.add(member)
                with (content / entry.path).open("rb") as stream:
                    tar.addfile(_member(member, entry.bytes), stream)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    tar.addfile(_member(name, len(data)), io.BytesIO(data))


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A file of nobody's, from no time: the same versions give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _unpack(file: Path, blobs: Path, limits: Limits, progress: Progress) -> Index:
    """Write every blob of the file under its sha256, proven; whatever else is in it is refused."""
    try:
        with tarfile.open(file, "r:") as tar:
            first = tar.next()
            if first is None or first.name != INDEX or not first.isreg() or first.size > INDEX_BYTES:
                raise InvalidArchive(f"'{file}' is no export of a registry: it does not begin with {INDEX}")
            index = load(Index, json.loads(_content(tar, first)))
            if index.format != FORMAT:
                raise InvalidArchive(f"'{file}' has format {index.format!r}, expected {FORMAT!r}")
            for member in tar:
                if member.name != INDEX:
                    _unpack_one(tar, member, file, blobs, limits)
                    progress(member.size)
            return index
    except InvalidArchive:
        raise
    except (tarfile.TarError, ValueError) as error:  # InvalidRequest is one
        raise InvalidArchive(f"'{file}' is no export of a registry: {error}") from error


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path, blobs: Path, limits: Limits) -> None:
    digest = member.name.removeprefix(BLOBS)
    if not member.isreg() or member.issparse() or not SHA256.fullmatch(digest) or member.name != BLOBS + digest:
        raise InvalidArchive(f"'{file}' holds {member.name!r}, expected nothing but files in {BLOBS}")
    if member.size > limits.max_bytes:
        raise InvalidArchive(f"'{file}' holds a file of {member.size:,} bytes, at most {limits.max_bytes:,} are taken")
    stream = tar.extractfile(member)
    assert stream  # it is a regular file
    written = write_durably(iter(lambda: stream.read(CHUNK_BYTES), b""), blobs / digest)
    if written.sha256 != digest:
        raise InvalidArchive(f"'{file}': {member.name} is not what its name says")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream
    return stream.read()


def _lay_out(entry: Entry, blobs: Path, folder: Path) -> Manifest:
    """One version's files in a folder of their own. Raises InvalidArchive."""
    what = f"{entry.name}:{entry.number}"
    try:
        manifest = Manifest.from_bytes((blobs / check_digest(entry.digest).removeprefix("sha256:")).read_bytes())
        for part in manifest.files:
            place = folder / part.path
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(blobs / part.sha256, place)
    except FileNotFoundError as error:
        raise InvalidArchive(f"{what} is not whole in this file: {Path(error.filename).name} is missing") from error
    except (RegistryError, FileExistsError) as error:
        raise InvalidArchive(f"{what}: {MANIFEST} cannot be read: {error}") from error
    return manifest
