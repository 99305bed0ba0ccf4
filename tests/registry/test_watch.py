"""The watch of alias moves: an iterator over a folder and a URL, a stream of events, and what may break of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import httpx
import pytest
import uvicorn
from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from loraplex_registry import events
from loraplex_registry.catalog import Catalog
from loraplex_registry.errors import (
    InvalidReference,
    InvalidRequest,
    RemoteError,
    StoreUnavailable,
    TooManyWatchers,
    Unauthorized,
    UnknownAdapter,
)
from loraplex_registry.events import Event, read_events, write_move, write_start
from loraplex_registry.http import create_app
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry, open_registry
from loraplex_registry.version import AliasMove
from loraplex_registry.watchers import StreamingServer

from .conftest import Adapter, make_receipt, served

SOON_SECONDS = 2.0  # in which a move must be live, says the issue


@pytest.fixture
def two(push) -> None:
    """a:1, a:2 and b:1."""
    push("a")
    push("a", seed=1)
    push("b")


def brief(move: AliasMove) -> tuple[str, int | None, int]:
    return str(move), move.from_number, move.to_number


# --- the same in a folder and behind a URL ---


def test_moves_come_in_order_from_the_call_on(two, registry):
    registry.promote("a:1", "staging")  # before: not told
    with registry.watch() as watch:
        made = [registry.promote("a:1", "production", "first"), registry.promote("a:2", "production")]
        registry.promote("a:2", "production")  # it is there already: no move
        made += [registry.promote("b:1", "production"), registry.rollback("a@production", reason="bad")]
        told = list(islice(watch, 4))
    assert told == made
    assert [brief(move) for move in told] == [
        ("a@production", None, 1),
        ("a@production", 1, 2),
        ("b@production", None, 1),
        ("a@production", 2, 1),
    ]
    assert [move.id for move in told] == [2, 3, 4, 5]
    assert told[3] == registry.history("a", "production")[-1]


def test_a_watch_is_for_all_a_name_or_one_alias(two, registry):
    made = [registry.promote(ref, to) for ref, to in (("a:1", "x"), ("b:1", "x"), ("a:2", "y"), ("a:2", "x"))]
    for ref, wanted in ((None, [0, 1, 2, 3]), ("a", [0, 2, 3]), ("a@x", [0, 3]), ("b@x", [1])):
        with registry.watch(ref, after=0) as watch:
            assert list(islice(watch, len(wanted))) == [made[index] for index in wanted]
            assert watch.after in (made[wanted[-1]].id, 4)
    with registry.watch("a", after=made[2].id) as watch:
        assert next(watch) == made[3]


def test_more_than_one_batch_is_told_whole(two, registry, tmp_path, monkeypatch):
    monkeypatch.setattr("loraplex_registry.watch.BATCH", 3)
    with open_registry(tmp_path / "registry") as other:
        for number in range(20):
            other.promote(f"a:{number % 2 + 1}", "x")
            other.promote(f"a:{number % 2 + 1}", f"alias-{number}")
    with registry.watch("a@x", after=0) as watch:
        assert [move.to_number for move in islice(watch, 20)] == [1, 2] * 10


def test_what_another_process_moves_is_seen_soon(two, registry, tmp_path):
    code = f"from loraplex_registry.remote import open_registry; open_registry({str(tmp_path / 'registry')!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with registry.watch("a@production") as watch:
        subprocess.run([sys.executable, "-c", f"{code}.promote('a:2', 'production')"], env=environment, check=True)
        moved_at = time.monotonic()
        assert next(watch).to_number == 2
        assert time.monotonic() - moved_at < SOON_SECONDS


def test_a_watch_that_waits_ends_when_another_thread_closes_it(two, registry):
    watch = registry.watch()
    told: list[AliasMove] = []
    reader = threading.Thread(target=lambda: told.extend(watch))
    reader.start()
    move = registry.promote("a:1", "production")
    wait_until(lambda: told == [move])
    watch.close()
    reader.join(SOON_SECONDS)
    assert not reader.is_alive()
    assert next(watch, None) is None
    watch.close()


@pytest.mark.parametrize(
    ("ref", "after", "error", "said"),
    [
        ("aa", None, UnknownAdapter, "no adapter 'aa'; the nearest is 'a'"),
        ("aa@production", None, UnknownAdapter, "no adapter 'aa'"),
        ("A b", None, InvalidReference, "'A b' is not a reference"),
        ("", None, InvalidReference, "'' is not a reference"),
        ("a:1", None, InvalidReference, "expected name or name@alias"),
        ("a@sha256:" + "0" * 64, None, InvalidReference, "expected name or name@alias"),
        ("a", 2, InvalidRequest, "after is 2, expected 0 to 1"),
        ("a", -1, InvalidRequest, "-1"),
    ],
)
def test_a_watch_of_what_cannot_be_watched(two, registry, ref, after, error, said):
    registry.promote("a:1", "production")
    with pytest.raises(error) as caught:
        registry.watch(ref, after)
    assert said in str(caught.value)


def test_a_store_that_goes_away_is_waited_for(two, registry, monkeypatch):
    """The catalog cannot be read for a while: why is told once, and no move is lost or told twice."""
    away, cuts, told = threading.Event(), [], []
    last_move = Catalog.last_move

    def sometimes(catalog: Catalog, prefix: str = "") -> int:
        if away.is_set():
            raise StoreUnavailable("the disk is away")
        return last_move(catalog, prefix)

    monkeypatch.setattr(Catalog, "last_move", sometimes)
    with registry.watch(cut=cuts.append) as watch:
        made = [registry.promote("a:1", "production")]
        reader = threading.Thread(target=lambda: told.extend(islice(watch, 3)))
        reader.start()
        wait_until(lambda: told == made)
        away.set()
        wait_until(lambda: cuts)
        made.append(registry.promote("a:2", "production"))
        time.sleep(0.5)  # it asks again meanwhile
        away.clear()
        made.append(registry.promote("a:1", "production"))
        reader.join(10)
    assert told == made
    assert [str(error) for error in cuts] == ["the disk is away"]


# --- the stream ---


@pytest.fixture
def local(tmp_path, base) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as registry:
        for seed in (0, 1):
            registry.push("a", Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base)))
        registry.promote("a:1", "production", "line\u2028separator\nand é", who="ada")
        yield registry


@pytest.fixture
def url(local) -> Iterator[str]:
    with served(local) as url:
        yield url


def test_the_stream_is_what_browsers_read(local, url):
    """By the letter of the specification: the ids, the kind and the JSON in one line each, and where to go on from."""
    with httpx.stream("GET", f"{url}/v1/watch?after=0") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        text = ""
        for chunk in response.iter_text():
            text += chunk
            if text.count("\n\n") == 2:
                break
    start, move, rest = text.split("\n\n")
    assert (start, rest) == ("retry: 1000\nid: 0", "")
    kind, number, data = move.split("\n")
    assert (kind, number) == ("event: move", "id: 1")
    told = json.loads(data.removeprefix("data: "))
    assert told["reason"] == "line\u2028separator\nand é"
    assert (told["name"], told["alias"], told["from_number"], told["to_number"]) == ("a", "production", None, 1)


def test_the_stream_goes_on_after_the_last_event_id(local, url):
    second = local.promote("a:2", "production")
    for headers, query in (({"Last-Event-ID": "1"}, ""), ({}, "?after=1"), ({"Last-Event-ID": "1"}, "?after=0")):
        with httpx.stream("GET", f"{url}/v1/watch{query}", headers=headers) as response:
            begin, move = islice(read_events(response.iter_bytes()), 2)
            assert (begin.id, begin.data) == ("1", "")
            assert (move.id, json.loads(move.data)["to_number"]) == (str(second.id), 2)


def test_events_are_read_whatever_the_pieces_they_come_in():
    text = ": hello\r\nretry: 5\r\nid: 3\r\n\r\nevent: move\nid:4\ndata: é\u2028:\n\n:\n\nid: 5\ndata: cut off".encode()
    for size in (1, 2, 7, 1000):
        pieces = (text[start : start + size] for start in range(0, len(text), size))
        assert list(read_events(pieces)) == [Event("3"), Event("4", "move", "é\u2028:")]


def test_a_server_that_tells_a_move_again_is_not_believed(local):
    """One that does not know `after`, or a proxy that replays, begins at the first move after each cut."""
    moves = [local.history("a", "production")[0], *(local.promote(ref, "production") for ref in ("a:2", "a:1", "a:2"))]
    lengths = iter((1, 2, 4))

    def answer(_request: Request) -> Response:
        parts = [write_start(0), *map(write_move, moves[: next(lengths)])]
        return StreamingResponse(iter(parts), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/watch", answer)])
    with serving(app) as url, RemoteRegistry(url) as remote, remote.watch(after=0) as watch:
        assert list(islice(watch, 4)) == moves


@pytest.mark.parametrize(
    ("query", "headers", "status", "code", "param"),
    [
        ("?ref=zzz", {}, 404, "adapter_not_found", "ref"),
        ("?ref=a:1", {}, 400, "invalid_reference", None),
        ("?after=2", {}, 400, "invalid_request", "after"),
        ("?after=many", {}, 400, "invalid_request", "after"),
        ("?after=-1", {}, 400, "invalid_request", "after"),
        (f"?after={10**30}", {}, 400, "invalid_request", "after"),
        ("", {"Last-Event-ID": "x"}, 400, "invalid_request", "Last-Event-ID"),
    ],
)
def test_questions_that_cannot_be_answered(url, query, headers, status, code, param):
    answer = httpx.get(f"{url}/v1/watch{query}", headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


def test_head_ends(url):
    with httpx.Client(base_url=url, timeout=SOON_SECONDS) as client:
        answer = client.head("/v1/watch")
        assert client.get("/health").status_code == 200  # on the same connection, which a stream would hold
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")


def test_the_number_who_watch_is_bounded_and_who_hangs_up_makes_room(local):
    app = create_app(local)
    watchers = app.state.watchers
    watchers.most = 2
    with serving(app) as url, RemoteRegistry(url) as remote:
        with remote.watch() as one, remote.watch() as other:
            with pytest.raises(TooManyWatchers, match="2 clients watch already"):
                remote.watch()
            local.promote("a:2", "production")
            assert next(one) == next(other)
            one.close()
            wait_until(lambda: watchers.count == 1)
            with remote.watch() as third:
                local.promote("a:1", "production")
                assert next(third) == next(other)
        wait_until(lambda: watchers.count == 0)
        assert watchers.looking is False
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as rude:
            rude.sendall(b"GET /v1/watch HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: watchers.count == 1)
        wait_until(lambda: watchers.count == 0)


def test_a_token_is_needed(local):
    with served(local, {"secret": "ada"}) as url:
        with RemoteRegistry(url) as nobody, pytest.raises(Unauthorized):
            nobody.watch()
        with RemoteRegistry(url, "secret") as ada, ada.watch(after=0) as watch:
            assert next(watch).to_number == 1


def test_heartbeats_keep_a_quiet_stream_alive(local, url, monkeypatch):
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(events, "SILENCE_SECONDS", 0.5)
    cuts = []
    with RemoteRegistry(url) as remote, remote.watch(cut=cuts.append) as watch:
        later = threading.Timer(1.2, local.promote, ("a:2", "production"))
        later.start()
        assert next(watch).to_number == 2
        assert cuts == []
        later.join()


def test_moves_of_other_names_do_not_put_the_heartbeat_off(local, url, monkeypatch):
    """They wake every stream; one that has nothing to tell waited a whole heartbeat anew, and was given up for dead."""
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.3)
    local.promote("a:1", "other")
    end = threading.Event()

    def promote_others() -> None:
        number = 1
        while not end.wait(0.05):
            number = 3 - number
            local.promote(f"a:{number}", "other")

    others = threading.Thread(target=promote_others)
    others.start()
    try:
        with httpx.stream("GET", f"{url}/v1/watch?ref=a@production", timeout=10) as stream:
            chunks = stream.iter_text()
            while events.HEARTBEAT not in next(chunks):
                pass
    finally:
        end.set()
        others.join()


# --- the command ---


@contextmanager
def command(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`registry …` in a process of its own, killed if it is still there at the end."""
    code = "from loraplex_registry.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", code, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("where", ["folder", "url"])
def test_the_command_prints_a_line_per_move_until_ctrl_c(local, url, tmp_path, where):
    place = url if where == "url" else tmp_path / "registry"
    with command("--registry", place, "watch", "a@production", "--after", 0) as plain:
        assert plain.stdout
        assert plain.stdout.readline().endswith(" a@production: a:1  promote by ada: line separator and é\n")
        with command("watch", "--format", "json", "--registry", place) as as_json:
            assert as_json.stdout
            assert as_json.stderr
            assert as_json.stderr.readline() == f"watching all aliases in {place}\n"
            local.promote("a:2", "production", who="ada")
            moved_at = time.monotonic()
            assert plain.stdout.readline()[19:] == "  a@production: a:1 → a:2  promote by ada\n"
            told = json.loads(as_json.stdout.readline())
            assert time.monotonic() - moved_at < SOON_SECONDS
            assert (told["id"], told["name"], told["alias"], told["to_number"], told["who"]) == (
                2,
                "a",
                "production",
                2,
                "ada",
            )
            for process in (plain, as_json):
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 0
                assert process.stderr
                assert "Traceback" not in process.stderr.read()


def test_a_mistyped_name_is_one_line(local, tmp_path):
    with command("--registry", tmp_path / "registry", "watch", "aa") as process:
        assert process.communicate(timeout=10) == ("", "error: no adapter 'aa'; the nearest is 'a'\n")
        assert process.returncode == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_at_once_though_streams_are_open_and_the_command_goes_on(local, tmp_path, how):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = ("--registry", tmp_path / "registry", "serve", "--port", port)
    with command(*serve) as server:
        assert server.stderr
        url = server.stderr.readline().split()[-1]
        with command("--registry", url, "watch") as watcher:
            assert watcher.stderr
            assert watcher.stdout
            assert watcher.stderr.readline() == f"watching all aliases in {url}\n"
            server.send_signal(how)
            server.wait(5)
            assert "ERROR" not in server.stderr.read()
            said = watcher.stderr.readline()
            assert said.startswith("the registry ")
            assert said.endswith("; trying again\n")
            local.promote("a:2", "production")
            with command(*serve):
                assert " a@production: a:1 → a:2 " in watcher.stdout.readline()


# --- what breaks ---


@contextmanager
def ended_when_stopped(registry: Registry, port: int) -> Iterator[None]:
    """The registry's own server, as `registry serve` runs it, on one port."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = StreamingServer(uvicorn.Config(create_app(registry), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield
        finally:
            server.should_exit = True
            thread.join(5)
            assert not thread.is_alive()


def test_a_server_that_stops_and_comes_back_loses_and_doubles_no_move(local):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cuts, told, made = [], [], []
    with RemoteRegistry(f"http://127.0.0.1:{port}") as remote:
        with ended_when_stopped(local, port):
            watch = remote.watch(cut=cuts.append)
            reader = threading.Thread(target=lambda: told.extend(watch))
            reader.start()
            made.append(local.promote("a:2", "production"))
            wait_until(lambda: told == made)
        made += [local.promote("a:1", "production"), local.promote("a:2", "production")]
        wait_until(lambda: cuts)
        with ended_when_stopped(local, port):
            made.append(local.promote("a:1", "production"))
            wait_until(lambda: told == made, 10)
            watch.close()
            reader.join(SOON_SECONDS)
            assert not reader.is_alive()
    assert len(cuts) == 1


def test_streams_that_are_cut_anywhere_lose_and_double_no_move(local, monkeypatch):
    """A proxy that passes a few bytes more each time, and then cuts: after an id, in the middle of a line, of an é."""
    monkeypatch.setattr("loraplex_registry.watch.LONGEST_PAUSE_SECONDS", 0.01)
    made = [local.history("a", "production")[0]]
    made += [local.promote(f"a:{number % 2 + 1}", "production", f"é {number}") for number in range(1, 4)]
    app, lengths = create_app(local), iter(range(1, 10_000, 23))

    async def cutting(scope, receive, send):
        left = next(lengths) if scope["path"] == "/v1/watch" else 1 << 30

        async def send_some(message):
            nonlocal left
            body = message.get("body", b"")
            left, message = left - len(body), message | ({"body": body[:left]} if "body" in message else {})
            await send(message)
            if left <= 0:
                raise ConnectionError("cut")

        try:
            await app(scope, receive, send_some)
        except ConnectionError:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    with serving(cutting) as url, RemoteRegistry(url) as remote:
        watch = None
        while watch is None:
            try:
                watch = remote.watch(after=0)
            except RemoteError as error:
                assert "ended the stream before it began" in str(error)
        with watch:
            assert list(islice(watch, 4)) == made


def test_a_server_that_takes_long_to_fail_is_told_of_once(local, monkeypatch):
    """An address that answers nothing costs a try its whole time limit: that is not a time in which all was well."""
    monkeypatch.setattr("loraplex_registry.watch.LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(events, "SILENCE_SECONDS", 0.2)
    cuts, tries = [], []

    async def mute(scope: Scope, receive: Receive, send: Send) -> None:
        tries.append(scope["path"])
        if len(tries) == 1:
            await PlainTextResponse(write_start(1), media_type="text/event-stream")(scope, receive, send)
        else:
            while (await receive())["type"] != "http.disconnect":
                pass

    with serving(mute, lifespan="off") as url, RemoteRegistry(url) as remote, remote.watch(cut=cuts.append) as watch:
        reader = threading.Thread(target=lambda: list(watch))
        reader.start()
        wait_until(lambda: len(tries) > 4)
        watch.close()
        reader.join(SOON_SECONDS)
        assert not reader.is_alive()
    assert [str(error) for error in cuts] == ["the registry ended the stream"]


def test_a_server_that_falls_silent_is_given_up(local, url, monkeypatch):
    """No cut is seen when a machine vanishes: the missing heartbeats tell."""
    monkeypatch.setattr(events, "SILENCE_SECONDS", 0.2)
    cuts = []
    with RemoteRegistry(url) as remote, remote.watch(cut=cuts.append) as watch:
        later = threading.Timer(1.0, local.promote, ("a:2", "production"))
        later.start()
        assert next(watch).to_number == 2
        later.join()
    assert cuts
    assert "does not answer" in str(cuts[0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda request: PlainTextResponse("hello"), "answered GET /v1/watch with 'text/plain'"),
        (lambda request: Response(status_code=502), "answered 502"),
        (lambda request: StreamingResponse(iter(["id: x\n\n"]), media_type="text/event-stream"), "cannot be read"),
        (lambda request: StreamingResponse(iter(["x" * (1 << 20)] * 2), media_type="text/event-stream"), "bytes"),
        (lambda request: StreamingResponse(iter([":\n\n"]), media_type="text/event-stream"), "before it began"),
    ],
)
def test_another_kind_of_server(answer, said):
    with serving(Starlette(routes=[Route("/v1/watch", answer)])) as url, RemoteRegistry(url) as remote:
        with pytest.raises(RemoteError) as caught:
            remote.watch()
        assert said in str(caught.value)


def test_no_server_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with RemoteRegistry(f"http://127.0.0.1:{port}") as remote, pytest.raises(RemoteError, match="does not answer"):
        remote.watch()


def wait_until(true, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
