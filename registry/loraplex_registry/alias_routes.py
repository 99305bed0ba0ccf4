"""The routes of aliases: where they point and pointed, what moves them, and the rules and approvals for that."""

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import bodies
from .auth import GuardedRoute, registry_of, who_of
from .protections import Approval, Rule
from .reference import Reference, parse_alias
from .request import query, read_json
from .tokens import ADMIN, PROMOTE, READ
from .version import AliasMove
from .watchers import watch
from .wire import dump


def list_aliases(request: Request) -> Response:
    return JSONResponse({"aliases": registry_of(request).aliases()})


async def promote(request: Request) -> Response:
    body = bodies.PROMOTE.read(await read_json(request))
    registry, require = registry_of(request), body.get("require", [])
    reason, who = body.get("reason", ""), who_of(request)
    move = await run_sync(lambda: registry.promote(body["ref"], body["to"], reason, require=require, who=who))
    return JSONResponse(dump(AliasMove, move))


async def rollback(request: Request) -> Response:
    body = bodies.ROLLBACK.read(await read_json(request))
    registry, (name, _) = registry_of(request), parse_alias(body["ref"])
    if "to" in body:
        Reference.parse(f"{name}:{body['to']}")  # a number that no version has is told before SQLite sees it
    move = await run_sync(
        lambda: registry.rollback(body["ref"], body.get("to"), body.get("reason", ""), who=who_of(request))
    )
    return JSONResponse(dump(AliasMove, move))


async def unalias(request: Request) -> Response:
    body, who = bodies.NAMED.read(await read_json(request)), who_of(request)
    registry, reason = registry_of(request), body.get("reason", "")
    return JSONResponse(dump(AliasMove, await run_sync(lambda: registry.remove_alias(body["ref"], reason, who=who))))


def history(request: Request) -> Response:
    moves = registry_of(request).history(*parse_alias(query(request, "ref")))
    return JSONResponse({"data": dump(list[AliasMove], moves)})


def list_protections(request: Request) -> Response:
    return JSONResponse({"data": dump(list[Rule], registry_of(request).protections.list())})


async def protect(request: Request) -> Response:
    body = bodies.PROTECT.read(await read_json(request))
    asks = [body.get(key, []) for key in ("require", "signed_by", "approvers")]
    protections, who, (name, alias) = registry_of(request).protections, who_of(request), parse_alias(body["ref"])
    return JSONResponse(dump(Rule, await run_sync(lambda: protections.protect(name, alias, *asks, who=who))))


async def unprotect(request: Request) -> Response:
    body = bodies.UNPROTECT.read(await read_json(request))
    protections, who, (name, alias) = registry_of(request).protections, who_of(request), parse_alias(body["ref"])
    return JSONResponse(dump(Rule, await run_sync(lambda: protections.unprotect(name, alias, who=who))))


async def approve(request: Request) -> Response:
    body = bodies.APPROVE.read(await read_json(request))
    protections, who = registry_of(request).protections, who_of(request)
    return JSONResponse(dump(Approval, await run_sync(lambda: protections.approve(body["ref"], body["for"], who=who))))


def list_approvals(request: Request) -> Response:
    found = registry_of(request).protections.approvals(query(request, "ref"))
    return JSONResponse({"data": dump(list[Approval], found)})


ALIASES = (
    GuardedRoute("GET", "/v1/aliases", list_aliases, READ),
    GuardedRoute("POST", "/v1/promote", promote, PROMOTE),
    GuardedRoute("POST", "/v1/rollback", rollback, PROMOTE),
    GuardedRoute("POST", "/v1/unalias", unalias, PROMOTE),
    GuardedRoute("GET", "/v1/history", history, READ),
    GuardedRoute("GET", "/v1/watch", watch, READ),
    GuardedRoute("GET", "/v1/protections", list_protections, READ),
    GuardedRoute("POST", "/v1/protect", protect, ADMIN),
    GuardedRoute("POST", "/v1/unprotect", unprotect, ADMIN),
    GuardedRoute("POST", "/v1/approve", approve, PROMOTE),
    GuardedRoute("GET", "/v1/approvals", list_approvals, READ),
)
