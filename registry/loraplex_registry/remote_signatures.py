"""The signatures of a registry server's versions, as RemoteRegistry's `signatures`: Signatures' methods over HTTP.

The server says which there are; whoever asks checks them by keys of their own.
"""

from collections.abc import Callable
from typing import Any

from .reference import check_digest
from .signing import Signature


class RemoteSignatures:
    """`ask` is RemoteRegistry's way to an answer, as a value of a type."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def add(self, digest: str, key: str, signature: str) -> Signature:
        body = {"digest": check_digest(digest), "key": key, "signature": signature}
        return self._ask(Signature, "POST", "/v1/signatures", json=body)

    def of(self, digest: str) -> list[Signature]:
        return self._ask(list[Signature], "GET", "/v1/signatures", params={"digest": check_digest(digest)}, key="data")
