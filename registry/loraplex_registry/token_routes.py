"""The routes of tokens: whose one is, and their making, listing and ending."""

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import bodies
from .auth import GuardedRoute, identity_of, registry_of, who_of
from .request import read_json
from .tokens import ADMIN, READ, Identity, NewToken, Token
from .wire import dump


def whoami(request: Request) -> Response:
    return JSONResponse(dump(Identity, identity_of(request)))


def list_tokens(request: Request) -> Response:
    return JSONResponse({"data": dump(list[Token], registry_of(request).tokens.list())})


async def create_token(request: Request) -> Response:
    body = bodies.TOKEN.read(await read_json(request))
    tokens, who = registry_of(request).tokens, who_of(request)
    made = await run_sync(lambda: tokens.create(**body, who=who))
    return JSONResponse(dump(NewToken, made), status_code=201, headers={"Cache-Control": "no-store"})


async def revoke_token(request: Request) -> Response:
    body = bodies.REVOKE.read(await read_json(request))
    tokens, who = registry_of(request).tokens, who_of(request)
    return JSONResponse(dump(Token, await run_sync(lambda: tokens.revoke(body["id"], who=who))))


TOKENS = (
    GuardedRoute("GET", "/v1/whoami", whoami, READ),
    GuardedRoute("GET", "/v1/tokens", list_tokens, ADMIN),
    GuardedRoute("POST", "/v1/tokens", create_token, ADMIN),
    GuardedRoute("POST", "/v1/tokens/revoke", revoke_token, ADMIN),
)
