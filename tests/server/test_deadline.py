"""Requests that end early: their time is over, their client is gone. Nothing of them runs on."""

import asyncio
import json
import threading
import time
from contextlib import ExitStack, suppress

import httpx
import pytest
from serving import serving
from tiny import make_adapter, make_base

from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import DeadlinePassed
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.loop import EngineLoop

# Thousands of steps: longer than any test waits.
ENDLESS = {"prompt": "the quick", "temperature": 0, "max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("wide"), max_position_embeddings=8192)


@pytest.fixture
def serve(tmp_path, base):
    with ExitStack() as stack:
        registry = stack.enter_context(Registry(tmp_path / "registry"))
        registry.push("red", make_adapter(tmp_path / "red", base), base=base)

        def start(engine=None, **options):
            config = ServerConfig(
                base=str(base), quantization="none", device="cpu", dtype="float32", registry=str(registry.root),
                engine=EngineConfig(**engine or {}), **options,
            )  # fmt: skip
            app = create_app(config)
            client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app)), timeout=60))
            client.app = app
            return client

        yield start


def within_a_moment(true) -> bool:
    deadline = time.monotonic() + 2
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def idle(client) -> bool:
    """Whether all that was asked ends within a moment: thousands of steps would not."""
    engine = client.app.state.service.engine
    return within_a_moment(lambda: not engine.has_work) and engine.pages.usage == 0


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"request_timeout": 0.3}, {}),
        ({"request_timeout": 30}, {"timeout": 0.3}),
        ({"request_timeout": 0.3}, {"timeout": 30}),
        ({}, {"timeout": 0.3, "n": 3}),
        ({}, {"timeout": 0.3, "best_of": 3, "adapter": "red"}),
        ({}, {"timeout": 0.3, "prompt": ["the quick", "fox"]}),
    ],
)
def test_time_that_is_over_is_408_and_nothing_runs_on(serve, options, body):
    client = serve(**options)
    started = time.monotonic()
    answer = client.post("/v1/completions", json={**ENDLESS, **body})
    took = time.monotonic() - started
    assert answer.status_code == 408, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("timeout", None)
    assert "0.3 s" in error["message"]
    assert 0.3 <= took < 5
    assert idle(client)
    name = body.get("adapter", "base")
    assert f'lora_request_errors_total{{adapter="{name}",code="timeout"}} 1.0' in client.get("/metrics").text
    if name == "red":
        assert answer.headers["X-Loraplex-Adapter-Version"] == "1"
    quick = client.post("/v1/completions", json={**ENDLESS, "max_tokens": 3, "timeout": 30})
    assert quick.json()["usage"]["completion_tokens"] == 3


def test_a_stream_that_has_begun_ends_with_an_error_event(serve):
    client = serve()
    with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True, "timeout": 0.5}) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert len(lines) > 1
    assert json.loads(lines[-1])["error"]["code"] == "timeout"
    assert idle(client)


def test_waiting_counts(serve, monkeypatch):
    """In the queue behind another, and for an adapter that does not come: no step ever looks at the request."""
    client = serve(engine={"max_rows": 1})
    with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        queued = client.post("/v1/completions", json={**ENDLESS, "max_tokens": 1, "timeout": 0.2})
        assert queued.status_code == 408
        assert within_a_moment(lambda: not client.app.state.service.engine.scheduler.waiting)
        assert next(line for line in lines if line), "the other goes on"
    assert idle(client)
    registry, let_go = client.app.state.service.registry, threading.Event()
    fetch = registry.fetch
    monkeypatch.setattr(registry, "fetch", lambda *args: let_go.wait(30) and fetch(*args))
    try:
        for stream in (False, True):  # of a stream nothing was sent yet: it has a status too
            body = {**ENDLESS, "max_tokens": 1, "adapter": "red", "timeout": 0.2, "stream": stream}
            assert client.post("/v1/completions", json=body).status_code == 408
        assert idle(client)
    finally:
        let_go.set()


@pytest.mark.parametrize(
    "body",
    [
        {"n": 3},
        {"best_of": 3},
        {"prompt": ["the quick", "fox"], "n": 2, "adapter": "red"},
        {"n": 2, "stream": True, "logprobs": 2, "echo": True},
        {"prompt": "again " * 1500, "max_tokens": 0, "logprobs": 5, "echo": True},
    ],
)
def test_who_hangs_up_is_not_computed_for(serve, body):
    client = serve(engine={"step_tokens": 16})
    body = {**ENDLESS, **body}
    if body.get("stream"):
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
    else:
        with suppress(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.3)
    assert idle(client)
    assert client.post("/v1/completions", json={**ENDLESS, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("value", [0, -1, "soon"])
def test_a_time_that_is_none_names_the_field(serve, value):
    answer = serve().post("/v1/completions", json={"prompt": "x", "timeout": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "timeout"


def test_time_is_over_even_if_nobody_reads(base):
    """A client that has stopped reading holds its answer's iterator up; the request would run on to its last token."""
    wake = threading.Event()
    engine = Engine(load_base(str(base), quantization="none", device="cpu", dtype="float32"), wake=wake.set)
    loop = EngineLoop(engine, wake)
    loop.start()

    async def story() -> None:
        now = time.monotonic()
        params = SamplingParams(max_tokens=8000, temperature=0, ignore_eos=True)
        deltas = loop.stream([Request("r", [5, 6, 7], params, arrived_at=now)], now + 0.3)
        await anext(deltas)
        while engine.has_work and time.monotonic() < now + 3:
            await asyncio.sleep(0.01)
        assert not engine.has_work
        with pytest.raises(DeadlinePassed, match=r"0\.3 s"):
            async for _ in deltas:
                pass

    try:
        asyncio.run(story())
    finally:
        loop.stop()
