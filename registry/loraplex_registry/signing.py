"""ed25519 keys and signatures (RFC 8032): what a version's signature is of, how it is made, and whether it holds.

Owns the key files, in PEM as openssl writes them. Knows no rows and no registry; needs `loraplex[signing]`.
"""

import base64
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidKey, NotSigned, SigningUnavailable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES, SIGNATURE_BYTES = 32, 64


@dataclass(frozen=True)
class PublicKey:
    """An ed25519 public key: its 32 bytes, as base64."""

    text: str

    @property
    def id(self) -> str:
        """For people to tell keys apart. Trust compares the whole key."""
        return "ed25519:" + hashlib.sha256(base64.b64decode(self.text)).hexdigest()[:16]

    @classmethod
    def parse(cls, text: str) -> "PublicKey":
        """Raises InvalidKey."""
        _bytes_of(text, KEY_BYTES, "the public key")
        return cls(text)

    @classmethod
    def read(cls, file: Path) -> "PublicKey":
        """The key of a PEM file. Raises InvalidKey, SigningUnavailable."""
        serialization, ed25519 = _library()
        try:
            key = serialization.load_pem_public_key(file.read_bytes())
        except OSError as error:
            raise InvalidKey(f"the public key '{file}' cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InvalidKey(f"'{file}' holds no public key in PEM, as `registry key create` writes") from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise InvalidKey(f"'{file}' holds a key of another kind, expected ed25519")
        return _public(key)


@dataclass(frozen=True)
class Signature:
    """One key's signature of one version: `key` is a PublicKey's text, `signature` 64 bytes as base64."""

    digest: str
    key: str
    signature: str
    who: str
    at: datetime

    @property
    def key_id(self) -> str:
        return PublicKey(self.key).id


def statement(digest: str) -> bytes:
    """The bytes that are signed: the digest, which names all content, and what for, so that it serves nothing else."""
    return f"loraplex.signature/1 {digest}\n".encode()


def create_key(file: Path) -> PublicKey:
    """Write a new private key (PKCS 8, mode 0600) and its public half, `file`.pub; neither may be there yet.

    Raises FileExistsError, SigningUnavailable.
    """
    serialization, ed25519 = _library()
    public_file = file.with_name(file.name + ".pub")
    for one in (file, public_file):
        if one.exists():
            raise FileExistsError(f"'{one}' is there already; name a new file")
    private = ed25519.Ed25519PrivateKey.generate()
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for one, content, mode in ((file, secret, 0o600), (public_file, public, 0o644)):
        with os.fdopen(os.open(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    return _public(private.public_key())


def sign(digest: str, file: Path) -> tuple[str, str]:
    """Sign a version's digest with the private key of a file; returns the public key and the signature, as base64.

    Raises InvalidKey, SigningUnavailable.
    """
    private = _read_private(file)
    return _public(private.public_key()).text, base64.b64encode(private.sign(statement(digest))).decode()


def holds(digest: str, key: str, signature: str) -> bool:
    """Whether this is the key's signature of the digest. Raises InvalidKey, SigningUnavailable."""
    from_bytes = _library()[1].Ed25519PublicKey.from_public_bytes
    from cryptography.exceptions import InvalidSignature

    try:
        from_bytes(_bytes_of(key, KEY_BYTES, "the public key")).verify(
            _bytes_of(signature, SIGNATURE_BYTES, "the signature"), statement(digest)
        )
    except InvalidSignature:
        return False
    return True


def check_signed(what: str, digest: str, signatures: Iterable[Signature], keys: Iterable[PublicKey]) -> None:
    """That one of the keys has signed the digest. Raises NotSigned, which says what is there instead."""
    wanted, found = {key.text: key for key in keys}, list(signatures)
    wrong = []
    for one in found:
        if one.key in wanted:
            if holds(digest, one.key, one.signature):
                return
            wrong.append(one.key_id)
    ids = " or ".join(key.id for key in wanted.values())
    if wrong:
        raise NotSigned(f"{what} ({digest}) has a signature by {', '.join(wrong)} that is wrong")
    others = f"only by {', '.join(one.key_id for one in found)}" if found else "by nobody"
    raise NotSigned(f"{what} ({digest}) has to be signed by {ids}, and is signed {others}")


def _read_private(file: Path) -> "Ed25519PrivateKey":
    serialization, ed25519 = _library()
    try:
        mode = file.stat().st_mode & 0o777
        content = file.read_bytes()
    except OSError as error:
        raise InvalidKey(f"the private key '{file}' cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise InvalidKey(f"others can read the private key '{file}' (mode {mode:o}), expected 600: chmod 600 it")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise InvalidKey(f"'{file}' holds no private key in PEM without a password") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InvalidKey(f"'{file}' holds a key of another kind, expected ed25519")
    return key


def _public(key: "Ed25519PublicKey") -> PublicKey:
    return PublicKey(base64.b64encode(key.public_bytes_raw()).decode())


def _bytes_of(text: str, count: int, what: str) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except ValueError:
        found = b""
    if len(found) != count or base64.b64encode(found).decode() != text:
        raise InvalidKey(f"{what} is {text[:100]!r}, expected {count} bytes as base64")
    return found


def _library() -> tuple[Any, Any]:
    """cryptography's modules, here and not above: it is an extra, and verbs that need no key shall not pay for it."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SigningUnavailable("signatures need the package cryptography: pip install 'loraplex[signing]'") from error
    return serialization, ed25519
