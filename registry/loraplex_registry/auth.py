"""Who asks, over HTTP, and how often: reads a request's bearer token, and holds each route to the scope it needs.

Knows no verbs: which route needs which scope is said where the route is, and what a prefix hides is `limited`'s to say.
"""

import hashlib
import hmac
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Forbidden, RateLimited, RegistryError, Unauthorized
from .limited import LimitedRegistry
from .rates import Buckets
from .registry import Registry
from .tokens import ADMIN, Identity, Tokens

OPEN = "open"  # instead of a scope: the route needs no token
ANYONE = Identity("http", (ADMIN,))  # who asks a registry that wants no tokens
THREADS = 4  # of their own: pulls and verifications, which may hold all others, keep nobody from being asked in
Refuse = Callable[[RegistryError, str], Response]


class Bearer:
    """Finds out who asks, and refuses whoever it does not know. Open paths are not asked."""

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens,
        static: Mapping[str, str],
        buckets: Buckets | None,
        open_paths: Sequence[str],
        refuse: Refuse,
    ) -> None:
        """`static` are tokens that were given to the server: token → who holds it. They may do everything.

        Without `buckets` everybody may ask as often as they like.
        """
        self.app, self._tokens, self._static, self._buckets = app, tokens, dict(static), buckets
        self._open, self._refuse = frozenset(open_paths), refuse
        self._threads = CapacityLimiter(THREADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open:
            await self.app(scope, receive, send)
            return
        scheme, _, given = Request(scope).headers.get("authorization", "").partition(" ")
        secret = given.strip() if scheme.lower() == "bearer" else ""
        try:
            identity = self._given(secret) or await run_sync(self._kept, secret, limiter=self._threads)
            if identity is None or identity is ANYONE:
                self._count(_address(scope))
            else:
                self._count(hashlib.sha256(_bytes(secret)).hexdigest())
            if identity is None:
                raise _unknown()
        except RegistryError as error:
            await self._refuse(error, scope["path"])(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["identity"], state["still_known"] = identity, partial(self._still_known, secret)
        if identity is not ANYONE:
            state["who"] = identity.name
        await self.app(scope, receive, send)

    def _still_known(self, secret: str) -> None:
        """For an answer that takes long: raises Unauthorized once the token was revoked, or has expired."""
        if not (self._given(secret) or self._kept(secret)):
            raise _unknown()

    def _given(self, secret: str) -> Identity | None:
        holders = [who for token, who in self._static.items() if hmac.compare_digest(_bytes(token), _bytes(secret))]
        return Identity(holders[0], (ADMIN,)) if holders else None

    def _kept(self, secret: str) -> Identity | None:
        if secret and (token := self._tokens.find(secret)):
            return token.identity
        return None if self._static or self._tokens.any() else ANYONE

    def _count(self, who: str) -> None:
        """Raises RateLimited."""
        if self._buckets is not None and (wait_seconds := self._buckets.take(who)):
            raise RateLimited(str(self._buckets.rate), math.ceil(wait_seconds))


def _unknown() -> Unauthorized:
    return Unauthorized("a bearer token that this registry knows is needed")


class GuardedRoute(Route):
    """One method of a path, for those who have a scope alone; HEAD needs what GET does."""

    def __init__(self, method: str, path: str, endpoint: Callable[[Request], Any], needs: str) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.needs, self._held = needs, self.app
        self.app = self._hold

    async def _hold(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.needs != OPEN:
            require(Request(scope), self.needs)
        await self._held(scope, receive, send)


def identity_of(request: Request) -> Identity:
    return request.state.identity


def require(request: Request, scope: str) -> None:
    """Raises Forbidden."""
    identity = identity_of(request)
    if not identity.may(scope):
        own = ", ".join(identity.scopes)
        raise Forbidden(f"this needs the scope '{scope}', and the token '{identity.name}' has {own}")


def registry_of(request: Request) -> Registry | LimitedRegistry:
    """The registry as the one who asks may see it."""
    registry: Registry = request.app.state.registry
    identity = identity_of(request)
    return LimitedRegistry(registry, identity, request.app.state.marks) if identity.prefix else registry


def who_of(request: Request) -> str:
    """What the ledgers say of the one who asks."""
    return getattr(request.state, "who", ANYONE.name)


def _address(scope: Scope) -> str:
    """Where a request comes from; of IPv6 the network, since one asker has all addresses of theirs."""
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ip_address(host)
    except ValueError:  # a Unix socket has none
        return host
    return str(ip_network((int(address), 64), strict=False)) if isinstance(address, IPv6Address) else str(address)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
