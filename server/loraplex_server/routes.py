"""The HTTP face: one function a route. Parses, asks the service, and shapes the answer; decides nothing else."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from time import monotonic
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loraplex_registry.version import Version
from loraplex_server.chat import CHAT, ChatBody, parse_chat
from loraplex_server.engine.engine import Delta
from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.request import Request
from loraplex_server.metrics import CONTENT_TYPE, UNKNOWN
from loraplex_server.openai import (
    COMPLETION,
    AdapterBody,
    CompletionBody,
    Shape,
    envelope,
    parse_adapter,
    parse_completion,
    usage,
)
from loraplex_server.problems import TooLarge, problem
from loraplex_server.service import Answer, Job, Service

T = TypeVar("T")
AnyBody = CompletionBody | ChatBody


async def completions(http: HttpRequest) -> Response:
    """POST /v1/completions."""
    return await _answered(http, parse_completion, COMPLETION)


async def chat_completions(http: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    return await _answered(http, parse_chat, CHAT)


async def _answered(http: HttpRequest, parse: Callable[[bytes], AnyBody], shape: Shape) -> Response:
    service: Service = http.app.state.service
    label, param, version, arrived_at = UNKNOWN, None, None, monotonic()
    try:
        body = parse(await _read(http))
        param = "adapter" if body.adapter is not None else "model"
        version = None if service.wants_base(body) else await _from_registry(service, service.resolve, body)
        label = version.name if version else "base"
        job = await run_in_threadpool(service.job, body, version, arrived_at, shape.id_prefix)
        answer = await (_streamed if body.stream else _whole)(service, job, body, shape, http)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it: the client closed the connection
    except Exception as error:
        found = problem(error, param)
        service.metrics.request_failed(label, found.code)
        answer = found.response()
    if version:
        answer.headers["X-Loraplex-Adapter-Digest"] = version.digest
        answer.headers["X-Loraplex-Adapter-Version"] = str(version.number)
    return answer


async def _whole(service: Service, job: Job, body: AnyBody, shape: Shape, http: HttpRequest) -> Response:
    """Wait for every sequence."""
    answers = {request.id: Answer() for request in job.requests}

    async def collect() -> None:
        async with aclosing(service.run(job)) as deltas:
            async for delta in deltas:
                answers[delta.request.id].take(delta)

    def told(index: int, request: Request) -> dict[str, Any]:
        answer, prompt = answers[request.id], service.prompt(job, request)
        text, scored = prompt.text + answer.text, None
        if body.alternatives is not None:
            offsets = [*prompt.offsets, *(len(prompt.text) + offset for offset in answer.offsets)]
            scored = shape.logprobs([*prompt.scores, *answer.scores], offsets, service.token_texts)
        return shape.choice(index, text, request.finish_reason, scored)

    def shaped() -> Response:
        choices = [told(i, request) for i, request in enumerate(job.best(answers))]
        return JSONResponse(envelope(shape.whole, _head(job), choices, usage(job.requests, job.sequences)))

    await _heard(http, collect())
    # A name costs 10 µs the first time, and a long prompt has thousands of alternatives: not on the event loop.
    return shaped() if body.alternatives is None else await run_in_threadpool(shaped)


async def _streamed(service: Service, job: Job, body: AnyBody, shape: Shape, http: HttpRequest) -> Response:
    """Server-sent events. The first delta is awaited here, so that what fails at once gets a status of its own."""
    deltas = service.run(job)
    first = await _heard(http, anext(deltas))
    return StreamingResponse(_events(service, job, body, shape, first, deltas), media_type="text/event-stream")


async def _events(
    service: Service, job: Job, body: AnyBody, shape: Shape, first: Delta, deltas: AsyncGenerator[Delta]
) -> AsyncIterator[str]:
    head, index = _head(job), {request.id: i for i, request in enumerate(job.requests)}
    prompts: dict[str, Answer] = {}  # by request: what was told of its prompt

    def event(request: Request, said: Answer, before: int, finish_reason: str | None = None) -> str:
        offsets = [before + offset for offset in said.offsets]
        scored = None if body.alternatives is None else shape.logprobs(said.scores, offsets, service.token_texts)
        return _event(envelope(shape.chunk, head, [shape.piece(index[request.id], said.text, finish_reason, scored)]))

    try:
        async with aclosing(_chain(first, deltas)) as every:
            async for delta in every:
                request = delta.request
                if request.id not in prompts:
                    prompts[request.id] = service.prompt(job, request)
                    if shape.opening:
                        yield _event(envelope(shape.chunk, head, [shape.opening(index[request.id])]))
                    if body.echoes:
                        yield await run_in_threadpool(event, request, prompts[request.id], 0)
                if delta.text or delta.finished or delta.score:
                    said = Answer()
                    said.take(delta)
                    yield event(request, said, len(prompts[request.id].text), delta.finish_reason)
    except Exception as error:
        found = problem(error)
        service.metrics.request_failed(job.label, found.code)
        yield _event(found.body)
        return
    if body.stream_options and body.stream_options.include_usage:
        yield _event(envelope(shape.chunk, head, [], usage(job.requests, job.sequences)))
    yield "data: [DONE]\n\n"


async def _chain(first: Delta, rest: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    try:
        yield first
        async for delta in rest:
            yield delta
    finally:
        await rest.aclose()


def _event(body: dict[str, Any]) -> str:
    # ASCII: some clients' line readers also break at U+0085 and U+2028.
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def _head(job: Job) -> dict[str, Any]:
    adapter = {"adapter": str(job.version), "adapter_digest": job.version.digest} if job.version else {"adapter": None}
    return {"id": job.id, "created": job.created, "model": job.model, **adapter}


async def _read(http: HttpRequest) -> bytes:
    """The body, bounded by the server's limit."""
    limit: int = http.app.state.config.max_body_bytes
    data = bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > limit:
            raise TooLarge(limit)
    return bytes(data)


async def _heard(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of the work, which is cancelled when the client hangs up.

    Raises:
        ClientDisconnect: the client hung up.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _from_registry(service: Service, ask: Callable[..., T], *args: Any) -> T:
    return await run_sync(ask, *args, limiter=service.registry_threads)


async def load_adapter(http: HttpRequest) -> Response:
    """POST /v1/load_lora_adapter: answered when the adapter is in host memory."""

    async def act(service: Service, body: AdapterBody, version: Version) -> dict[str, Any]:
        await _heard(http, service.load(version, body.pinned))
        return {"loaded": True, "pinned": body.pinned}

    return await _with_adapter(http, act)


async def unload_adapter(http: HttpRequest) -> Response:
    """POST /v1/unload_lora_adapter."""

    async def act(service: Service, body: AdapterBody, version: Version) -> dict[str, Any]:
        if body.pinned:
            raise InvalidRequest("pinned is given, but an adapter that is unloaded is not kept; leave it out", "pinned")
        return {"unloaded": await service.unload(version)}

    return await _with_adapter(http, act)


async def _with_adapter(
    http: HttpRequest, act: Callable[[Service, AdapterBody, Version], Awaitable[dict[str, Any]]]
) -> Response:
    service: Service = http.app.state.service
    try:
        body = parse_adapter(await _read(http))
        version = await _from_registry(service, service.find, body.lora_name)
        done = await act(service, body, version)
    except ClientDisconnect:
        return Response(status_code=499)
    except Exception as error:
        return problem(error, "lora_name").response()
    named = {"lora_name": body.lora_name, "adapter": str(version), "adapter_digest": version.digest}
    return JSONResponse({**named, **done})


async def models(http: HttpRequest) -> Response:
    """GET /v1/models."""
    service: Service = http.app.state.service
    try:
        data = await _from_registry(service, service.models)
    except Exception as error:
        return problem(error).response()
    return JSONResponse({"object": "list", "data": data})


async def model(http: HttpRequest) -> Response:
    """GET /v1/models/{id}."""
    service: Service = http.app.state.service
    try:
        return JSONResponse(await _from_registry(service, service.model, http.path_params["name"]))
    except Exception as error:
        return problem(error, "model").response()


async def health(http: HttpRequest) -> Response:
    """GET /health: the event loop turns and the engine's thread lives."""
    alive = http.app.state.service.loop.alive
    return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)


async def ready(http: HttpRequest) -> Response:
    """GET /ready: the base is loaded, the registry has been seen once, and the server is not on its way out."""
    service: Service = http.app.state.service
    conditions = {
        "engine": service.loop.alive,
        "registry": service.watch.ready,
        "draining": not http.app.state.door.closed,
    }
    waits_for = [what for what, fulfilled in conditions.items() if not fulfilled]
    return JSONResponse({"ready": not waits_for, "waiting_for": waits_for}, 503 if waits_for else 200)


async def metrics(http: HttpRequest) -> Response:
    """GET /metrics."""
    body, content_type = await run_in_threadpool(http.app.state.service.metrics.render)
    return Response(body, headers={"Content-Type": content_type})


async def routing(http: HttpRequest) -> Response:
    """GET /metrics/routing: what a Gateway API inference picker reads."""
    service: Service = http.app.state.service
    return Response(service.metrics.render_routing(service.snapshot()), headers={"Content-Type": CONTENT_TYPE})


ROUTES = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", metrics),
    Route("/metrics/routing", routing),
]
