"""The tokens of a registry server, as RemoteRegistry's `tokens`: Tokens' methods over HTTP."""

from collections.abc import Callable, Sequence
from typing import Any

from .tokens import NewToken, Token


class RemoteTokens:
    """`ask` is RemoteRegistry's way to an answer, as a value of a type."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def create(
        self, name: str, scopes: Sequence[str], prefix: str = "", expires_seconds: int | None = None
    ) -> NewToken:
        body = {"name": name, "scopes": list(scopes), "prefix": prefix, "expires_seconds": expires_seconds}
        return self._ask(NewToken, "POST", "/v1/tokens", json=body)

    def list(self) -> "list[Token]":
        return self._ask(_Tokens, "GET", "/v1/tokens", key="data")

    def revoke(self, token_id: str) -> Token:
        return self._ask(Token, "POST", "/v1/tokens/revoke", json={"id": token_id})


_Tokens = list[Token]  # the class has a method called list
