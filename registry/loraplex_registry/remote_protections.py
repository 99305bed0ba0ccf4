"""The rules of a registry server's aliases, as RemoteRegistry's `protections`: Protections' methods over HTTP."""

from collections.abc import Callable, Sequence
from typing import Any

from .protections import Approval, Rule
from .reference import Reference, check_alias, check_name


class RemoteProtections:
    """`ask` is RemoteRegistry's way to an answer, as a value of a type."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    def protect(
        self,
        name: str,
        alias: str,
        require: Sequence[str] = (),
        signed_by: Sequence[str] = (),
        approvers: Sequence[str] = (),
    ) -> Rule:
        ref = f"{check_name(name)}@{check_alias(alias)}"
        body = {"ref": ref, "require": list(require), "signed_by": list(signed_by), "approvers": list(approvers)}
        return self._ask(Rule, "POST", "/v1/protect", json=body)

    def unprotect(self, name: str, alias: str) -> Rule:
        return self._ask(Rule, "POST", "/v1/unprotect", json={"ref": f"{check_name(name)}@{check_alias(alias)}"})

    def list(self) -> "list[Rule]":
        return self._ask(_Rules, "GET", "/v1/protections", key="data")

    def approve(self, ref: str | Reference, alias: str) -> Approval:
        return self._ask(Approval, "POST", "/v1/approve", json={"ref": str(ref), "for": alias})

    def approvals(self, ref: str | Reference) -> "list[Approval]":
        return self._ask(_Approvals, "GET", "/v1/approvals", params={"ref": str(ref)}, key="data")


_Rules, _Approvals = list[Rule], list[Approval]  # the class has a method called list
