"""Both clients against a real HTTP server that follows the protocol, and one that breaks it in known ways."""

import asyncio
import contextlib
import pickle
import re
import time
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse

import loraplex
from loraplex import errors
from loraplex.retry import Retries

from .conftest import DIGEST, WORDS, ProtocolServer, event, sse

TEXT = "".join(WORDS)


# Answers


def test_complete(connect, server):
    answer = connect().complete("Be brave. ->:", adapter="quotes-tagger@production", max_tokens=8, temperature=0.0)
    assert answer.text == TEXT
    assert answer.finish_reason == "stop"
    assert answer.usage == loraplex.Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    assert (answer.adapter, answer.adapter_digest) == ("quotes-tagger:1", DIGEST)
    assert (answer.id, answer.created, answer.model) == ("cmpl-1", 1_700_000_000, "tiny")
    assert answer.choices[0]["text"] == TEXT
    assert server.seen[0].body == {
        "prompt": "Be brave. ->:",
        "adapter": "quotes-tagger@production",
        "max_tokens": 8,
        "temperature": 0.0,
        "stream": False,
    }


def test_options_left_out_or_none_are_the_servers_to_choose(connect, server):
    answer = connect().complete("hi", adapter=None, seed=None, stop=["\n"], n=1, extra_body={"top_k": 5})
    assert server.seen[0].body == {"prompt": "hi", "stop": ["\n"], "n": 1, "top_k": 5, "stream": False}
    assert (answer.adapter, answer.adapter_digest) == (None, None)


def test_an_unknown_option_names_the_nearest(connect, server):
    client = connect()
    for ask in (client.complete, client.stream):
        with pytest.raises(TypeError, match="unknown option 'max_token'; did you mean 'max_tokens'"):
            ask("hi", max_token=3)
    with pytest.raises(TypeError, match=r"prompt: expected a str, got list"):
        client.complete(["a", "b"])
    assert not server.seen


def test_stream(connect, server):
    chunks = list(connect().stream("hi", adapter="quotes-tagger", include_usage=True))
    assert [chunk.text for chunk in chunks] == [*WORDS, ""]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop", None]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1].usage == loraplex.Usage(3, 4, 7)
    assert {chunk.adapter_digest for chunk in chunks} == {DIGEST}
    assert chunks[0].adapter == "quotes-tagger"
    assert server.seen[0].body["stream"] is True
    assert server.seen[0].body["stream_options"] == {"include_usage": True}


def test_characters_cut_across_http_chunks_and_keep_alives(connect, server):
    whole = event("žluťoučký ") + b": keep-alive\n\n" + event("🙂\u2028", finish_reason="stop") + b"data: [DONE]\n\n"
    server.script.append(server.pieces(*(whole[at : at + 1] for at in range(len(whole)))))
    assert [chunk.text for chunk in connect().stream("hi")] == ["žluťoučký ", "🙂\u2028"]


def test_closing_a_stream_early_closes_the_connection(connect, server):
    server.script.append(server.endless())
    with contextlib.closing(connect().stream("hi")) as chunks:
        assert next(chunks).text == "again "
        assert not server.cancelled.is_set()
    assert server.cancelled.wait(5)


def test_leaving_an_async_loop_early_closes_the_connection(server):
    server.script.append(server.endless())

    async def ask() -> bool:
        async with loraplex.AsyncClient(server.url) as client:
            async for _ in client.stream("hi"):
                break
            return await asyncio.to_thread(server.cancelled.wait, 5)

    assert asyncio.run(ask())


def test_many_streams_at_once(server):
    async def ask(client: loraplex.AsyncClient) -> str:
        return "".join([chunk.text async for chunk in client.stream("hi")])

    async def ask_all() -> list[str]:
        async with loraplex.AsyncClient(server.url) as client:
            return await asyncio.gather(*(ask(client) for _ in range(50)))

    assert asyncio.run(ask_all()) == [TEXT] * 50


def test_models(connect):
    base, adapter = connect().models()
    assert base == loraplex.Model("org/tiny[4bit]", 1, "loraplex", None, None, None, ())
    assert adapter == loraplex.Model(
        "quotes-tagger", 2, "loraplex", "org/tiny[4bit]", DIGEST, 3, ("production", "canary")
    )


def test_probes(connect, server, nowhere):
    client = connect()
    assert client.health() is True
    assert client.ready() is True
    server.script.append(server.error(503))
    assert client.ready() is False
    assert len(server.seen) == 3  # a probe says how it is now, and does not ask again
    with pytest.raises(errors.APIConnectionError):
        connect(nowhere).ready()


# Errors


@pytest.mark.parametrize(
    ("status", "code", "expected", "kin"),
    [
        (400, None, errors.BadRequest, ValueError),
        (401, "invalid_api_key", errors.Unauthorized, PermissionError),
        (403, None, errors.Unauthorized, PermissionError),
        (404, "adapter_not_found", errors.AdapterNotFound, LookupError),
        (404, "model_not_found", errors.AdapterNotFound, LookupError),
        (404, None, errors.APIStatusError, errors.LoraplexError),
        (413, "too_large", errors.BadRequest, ValueError),
        (418, None, errors.APIStatusError, errors.LoraplexError),
        (422, "adapter_refused", errors.AdapterRefused, ValueError),
        (422, None, errors.BadRequest, ValueError),
        (429, None, errors.RateLimited, errors.LoraplexError),
        (500, None, errors.ServerError, errors.LoraplexError),
        (503, None, errors.ServerError, errors.LoraplexError),
    ],
)
@pytest.mark.parametrize("method", ["complete", "stream"])
def test_statuses(connect, server, method, status, code, expected, kin):
    server.script.append(server.error(status, code, param="prompt"))
    client = connect(max_retries=0)
    with pytest.raises(kin) as caught:
        list(client.stream("hi")) if method == "stream" else client.complete("hi")
    error = caught.value
    assert type(error) is expected
    assert (error.status, error.code, error.param, error.type) == (status, code, "prompt", "some_error")
    assert str(error) == error.message == f"told to say {status}"
    assert len(server.seen) == 1


def test_an_error_that_is_not_ours_shows_the_page(connect, server):
    server.script.append(server.raw("<h1>Bad\n gateway</h1>", 502))
    with pytest.raises(errors.ServerError, match="HTTP 502: <h1>Bad gateway</h1>"):
        connect().complete("hi")


@pytest.mark.parametrize("content", ["<h1>hello</h1>", "[]", '{"choices": []}', "null", '{"choices": 3}'])
def test_an_answer_that_is_not_ours(connect, server, content):
    client = connect()
    for ask in (lambda: client.complete("hi"), client.models, lambda: list(client.stream("hi"))):
        server.script.append(server.raw(content))
        with pytest.raises(errors.APIResponseError):
            ask()


@pytest.mark.parametrize("data", [b"{", b'{"id": 1}', b"\xff", b"3"])
def test_an_event_that_is_not_ours(connect, server, data):
    server.script.append(server.pieces(event("one"), b"data: " + data + b"\n\n"))
    chunks = connect().stream("hi")
    assert next(chunks).text == "one"
    with pytest.raises(errors.APIResponseError):
        next(chunks)


def test_a_server_that_ignores_the_adapter_is_found_out(connect, server):
    """A server that does not know the field answers from its base; that must not pass for the adapter's answer."""
    plain = {"id": "1", "created": 1, "model": "m", "choices": [{"text": "x", "finish_reason": "stop"}]}
    client = connect()
    server.script.append(lambda body: JSONResponse(plain))
    with pytest.raises(errors.APIResponseError, match="asked for adapter 'quotes-tagger'"):
        client.complete("hi", adapter="quotes-tagger")
    server.script.append(lambda body: server.pieces(event("x"), b"data: [DONE]\n\n")({}))
    with pytest.raises(errors.APIResponseError, match="asked for adapter 'quotes-tagger'"):
        next(client.stream("hi", adapter="quotes-tagger"))


def test_an_error_inside_a_stream_keeps_what_came_before(connect, server):
    refused = {"message": "blob is damaged", "type": "adapter_error", "param": None, "code": "adapter_refused"}
    for error, expected in ((refused, errors.AdapterRefused), ({"message": "engine stopped"}, errors.ServerError)):
        # One HTTP chunk: the tokens before the error must come out though they arrive with it.
        server.script.append(server.pieces(event("one") + event(" two") + sse({"error": error})))
        chunks = connect().stream("hi")
        assert [next(chunks).text, next(chunks).text] == ["one", " two"]
        with pytest.raises(expected, match=error["message"]) as caught:
            next(chunks)
        assert caught.value.status == 0
    assert len(server.seen) == 2


def test_a_stream_cut_off_is_an_error_and_is_not_repeated(connect, server):
    cuts: list[tuple[bytes | Exception, ...]] = [
        (event("one"), RuntimeError("the connection breaks here")),
        (event("one"),),  # ends in good order, but without [DONE]
    ]
    for pieces in cuts:
        server.script.append(server.pieces(*pieces))
        chunks = connect().stream("hi")
        assert next(chunks).text == "one"
        with pytest.raises(errors.APIConnectionError):
            next(chunks)
    assert len(server.seen) == len(cuts)


def test_timeouts_are_not_repeated(connect, server):
    client = connect(timeout=0.3)
    server.script.append(server.hang())
    with pytest.raises(TimeoutError, match=r"within 0\.3 s") as caught:
        client.complete("hi")
    assert type(caught.value) is errors.APITimeoutError
    server.script.append(server.hang(event("one")))
    chunks = client.stream("hi")
    assert next(chunks).text == "one"
    with pytest.raises(errors.APITimeoutError):
        next(chunks)
    assert len(server.seen) == 2


def test_nobody_there(connect, nowhere):
    with pytest.raises(ConnectionError, match=f"cannot reach {nowhere}") as caught:
        connect(nowhere, max_retries=1).complete("hi")
    assert type(caught.value) is errors.APIConnectionError


def test_every_error_is_in_the_drawing_and_exported():
    def tree(kind: type) -> list[type]:
        return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]

    assert errors.__doc__
    for kind in tree(errors.LoraplexError):
        assert re.search(rf"\b{kind.__name__}\b", errors.__doc__)
        assert getattr(loraplex, kind.__name__) is kind
        assert kind.__name__ in loraplex.__all__
        for base in kind.__bases__:
            if base.__module__ == "builtins" and base is not Exception:
                assert f"{kind.__name__} ({base.__name__})" in errors.__doc__


def test_errors_survive_pickle():
    """An error that cannot be unpickled hangs a multiprocessing pool instead of reaching its caller."""
    for kind in (errors.AdapterNotFound, errors.Unauthorized, errors.RateLimited):
        error = kind("no such adapter", status=404, code="adapter_not_found", retry_after=1.5)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert (str(again), vars(again)) == ("no such adapter", vars(error))


# Retries


def test_turned_away_twice_and_then_served(connect, server):
    """Jitter alone waits less than 0.5 s here, so the first gap tells whether Retry-After was honoured."""
    server.script += [server.error(429, Retry_After="1"), server.error(503, Retry_After="0")]
    assert "".join(chunk.text for chunk in connect().stream("hi")) == TEXT
    first, second, _ = (seen.at_seconds for seen in server.seen)
    assert second - first >= 1


def test_patience_ends(connect, server):
    server.script += [server.error(429)] * 2 + [server.error(503)] * 2
    with pytest.raises(errors.RateLimited):
        connect(max_retries=1).complete("hi")
    with pytest.raises(errors.ServerError):
        next(connect(max_retries=1).stream("hi"))
    assert len(server.seen) == 4


def test_a_wait_too_long_is_the_callers_to_make(connect, server):
    soon = time.time() + 3600
    for value in ("3600", formatdate(soon, usegmt=True)):
        server.script.append(server.error(429, Retry_After=value))
        with pytest.raises(errors.RateLimited) as caught:
            connect().complete("hi")
        assert caught.value.retry_after == pytest.approx(3600, abs=5)
    assert len(server.seen) == 2


class NotYet(httpx.HTTPTransport):
    """The first two connections go to a port where nobody listens, as while a server is starting."""

    refusals = 2

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return super().handle_request(self.misdirect(request))

    def misdirect(self, request: httpx.Request) -> httpx.Request:
        self.refusals -= 1
        if self.refusals >= 0:
            request.url = request.url.copy_with(port=1)
        return request


class AsyncNotYet(httpx.AsyncHTTPTransport):
    refusals = 2
    misdirect = NotYet.misdirect

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await super().handle_async_request(self.misdirect(request))  # type: ignore[arg-type]


def test_a_server_that_is_still_starting(server):
    with loraplex.Client(server.url, transport=NotYet()) as client:
        assert client.complete("hi").text == TEXT

    async def ask() -> str:
        async with loraplex.AsyncClient(server.url, transport=AsyncNotYet()) as client:
            return (await client.complete("hi")).text

    assert asyncio.run(ask()) == TEXT
    assert len(server.seen) == 2

    with loraplex.Client(server.url, transport=NotYet(), max_retries=1) as client, pytest.raises(ConnectionError):
        client.complete("hi")


def test_backoff_grows_and_stops_growing():
    waits = []
    for _ in range(300):
        retries = Retries(7)
        error = errors.RateLimited("busy", status=429)
        waits.append([retries.wait_seconds(error) for _ in range(7)])
        with pytest.raises(errors.RateLimited):
            retries.wait_seconds(error)
    longest = [max(column) for column in zip(*waits, strict=True)]
    bounds = [0.5, 1, 2, 4, 8, 8, 8]
    # 300 uniform draws all under 0.9 of their bound: a chance of 2e-14.
    assert all(0.9 * bound < wait <= bound for wait, bound in zip(longest, bounds, strict=True))


# Settings


def test_settings_from_the_environment(connect, server, monkeypatch):
    monkeypatch.setenv("LORAPLEX_URL", server.url + "/v1/")
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret-from-env\n")
    client = connect(None)
    client.complete("hi")
    connect(api_key="secret-given").complete("hi")
    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer secret-from-env", "Bearer secret-given"]
    assert "secret" not in repr(loraplex.Client())
    assert "secret" not in repr(loraplex.AsyncClient()._settings)


def test_no_key_no_header(connect, server):
    connect().health()
    assert "authorization" not in server.seen[0].headers
    assert server.seen[0].headers["user-agent"].startswith("loraplex-python/")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "localhost:8000"}, "base_url: .*localhost:8000"),
        ({"base_url": "http://"}, "base_url"),
        ({"timeout": 0}, "timeout: .* 0"),
        ({"max_retries": -1}, "max_retries: .* -1"),
        ({"api_key": "two\nlines"}, "^api_key: expected printable ASCII characters on one line$"),
    ],
)
@pytest.mark.parametrize("client", [loraplex.Client, loraplex.AsyncClient])
def test_settings_that_cannot_be(client, settings, said):
    with pytest.raises(ValueError, match=said):
        client(**settings)


def test_the_types_travel_with_the_package():
    assert (Path(loraplex.__file__).parent / "py.typed").exists()


def test_both_clients_offer_the_same(server: ProtocolServer):
    def methods(kind: type) -> set[str]:
        return {name.removeprefix("a") for name in vars(kind) if not name.startswith("_")}

    assert methods(loraplex.Client) == methods(loraplex.AsyncClient)
