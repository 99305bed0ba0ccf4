"""The HTTP face by itself: statuses, error bodies, tokens, limits, and what a dishonest client cannot do."""

import hashlib
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from serving import serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from loraplex_registry.base import describe_base
from loraplex_registry.errors import CorruptBlob, InvalidAdapter, RemoteError, TooLarge, Unauthorized
from loraplex_registry.http import read_tokens
from loraplex_registry.manifest import FileEntry
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry, open_registry
from loraplex_registry.serve_commands import _listen
from loraplex_registry.validate import Limits
from loraplex_registry.wire import Proposal, dump

from .conftest import Adapter, make_receipt, served


@pytest.fixture
def local(tmp_path):
    with Registry(tmp_path / "registry", Limits(max_bytes=100_000)) as registry:
        yield registry


@pytest.fixture
def http(local):
    with served(local) as url, httpx.Client(base_url=url) as client:
        yield client


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def proposal(folder, base):
    files = tuple(FileEntry.of(path, path.name) for path in sorted(folder.iterdir()))
    return dump(Proposal, Proposal(files, describe_base(base), ""))


def upload(http, folder):
    for path in folder.iterdir():
        assert http.put(f"/v1/blobs/{sha(path.read_bytes())}", content=path.read_bytes()).status_code == 201


@pytest.mark.parametrize(
    ("route", "status", "code", "param"),
    [
        ("/v1/resolve?ref=none", 404, "adapter_not_found", "ref"),
        ("/v1/resolve?ref=NOT%20ONE", 400, "invalid_reference", None),
        ("/v1/resolve", 400, "invalid_request", "ref"),
        ("/v1/search?q=a:b", 400, "invalid_query", None),
        ("/v1/search?limit=many", 400, "invalid_request", "limit"),
        ("/v1/search?cursor=WyJsaXN0IiwgImEiXQ", 400, "invalid_request", "cursor"),
        ("/v1/adapters?cursor=%F0%9F%8E%88", 400, "invalid_request", "cursor"),
        ("/v1/adapters?cursor=WyJsaXN0IiwgMV0", 400, "invalid_request", "cursor"),
        ("/v1/adapters?limit=1001", 400, "invalid_request", "limit"),
        ("/v1/adapters/none/versions?cursor=x", 400, "invalid_request", "cursor"),
        ("/v1/audit?name=", 400, "invalid_reference", None),
        ("/v1/verify?ref=", 400, "invalid_reference", None),
        ("/v1/audit?limit=0", 400, "invalid_request", "limit"),
        ("/v1/adapters/none/versions", 404, "adapter_not_found", "ref"),
        ("/v1/history?ref=none", 400, "invalid_reference", None),
        ("/v1/blobs/sha256:" + "0" * 64, 404, "digest_not_found", "ref"),
        ("/v1/blobs/..%2F..%2Fcatalog.sqlite3", 404, "invalid_request", None),
        ("/v1/blobs/catalog.sqlite3", 400, "invalid_reference", None),
        ("/v1/manifests/sha256:" + "0" * 64, 422, "corrupt_blob", None),
        ("/nowhere", 404, "invalid_request", None),
    ],
)
def test_errors_have_openais_shape(http, route, status, code, param):
    answer = http.get(route)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[" * 100_000, None),
        (b"[]", None),
        (b"{}", "ref"),
        (b'{"ref": 1, "to": "x"}', "ref"),
        (b'{"ref": "a", "to": "x", "more": 1}', "more"),
        (b'{"ref": "a", "to": null}', "to"),
        (b'{"ref": "a", "to": "x", "require": "f1>1"}', "require"),
        (b'{"ref": "a", "to": "x", "require": [1]}', "require"),
    ],
)
def test_bodies_that_cannot_be_read(http, body, param):
    answer = http.post("/v1/promote", content=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "param"),
    [
        ("delete", {"ref": "quotes-tagger"}, 400, "invalid_reference", None),
        ("delete", {"ref": "quotes-tagger:1"}, 404, "adapter_not_found", "ref"),
        ("delete", {}, 400, "invalid_request", "ref"),
        ("restore", {"ref": "quotes-tagger:1", "why": "x"}, 400, "invalid_request", "why"),
        ("gc", {"keep": True}, 400, "invalid_request", "keep"),
        ("gc", {"keep": 0}, 400, "invalid_request", "keep"),
        ("gc", {"grace_seconds": 1.5}, 400, "invalid_request", "grace_seconds"),
        ("gc", {"grace": "2h"}, 400, "invalid_request", "grace"),
    ],
)
def test_deletions_that_cannot_be(http, route, body, status, code, param):
    answer = http.post(f"/v1/{route}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


def test_a_deletion_says_who_holds_the_token(local, base, tmp_path):
    local.push("x", Adapter().write(tmp_path / "a", make_receipt(base)), base=base)
    with served(local, {"secret": "ada"}) as url, httpx.Client(base_url=url) as client:
        for route in ("delete", "restore", "gc"):
            assert client.post(f"/v1/{route}", json={"ref": "x:1"}).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert client.post("/v1/delete", json={"ref": "x:1"}, headers=headers).json()["who"] == "ada"
        assert client.post("/v1/delete", json={"ref": "x:1"}, headers=headers).json()["error"]["detail"]["who"] == "ada"
        local.promote(str(local.push("x", tmp_path / "a", base=base)), "production")
        answer = client.post("/v1/delete", json={"ref": "x:1"}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_in_use")
        assert client.post("/v1/gc", json={}, headers=headers).json()["files"] == 0


def test_health_and_ready(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.post("/health").status_code == 405


def test_a_wrong_method_is_told_the_right_ones(http):
    assert http.delete(f"/v1/blobs/{sha(b'x')}").headers["allow"] == "GET, HEAD, PUT"
    assert http.put("/v1/adapters/a/versions").headers["allow"] == "GET, HEAD, POST"


def test_pages_are_linked(http, local, base, tmp_path):
    for seed, name in enumerate("abc"):
        local.push(name, Adapter(seed=seed).write(tmp_path / name), base=base)
        local.promote(f"{name}:1", "production")
    seen, url = [], f"{http.base_url}/v1/search?q=rank%3E1&sort=name&limit=1"
    while url:
        answer = http.get(url)
        seen += [version["name"] for version in answer.json()["data"]]
        assert ("next" in answer.links) == (answer.json()["next"] is not None)
        url = answer.links.get("next", {}).get("url")
    assert seen == ["a", "b", "c"]
    listed = http.get("/v1/adapters?limit=2").json()
    assert [version["name"] for version in listed["data"]] == list(listed["aliases"]) == ["a", "b"]
    assert list(http.get("/v1/aliases").json()["aliases"]) == ["a", "b", "c"]


def test_ranges_and_etags(http, local, base, tmp_path):
    version = local.push("x", Adapter().write(tmp_path / "a"), base=base)
    entry = local.manifest(version.digest).files[0]
    whole = http.get(f"/v1/blobs/sha256:{entry.sha256}")
    part = http.get(f"/v1/blobs/sha256:{entry.sha256}", headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, whole.content[2:6])
    assert whole.headers["etag"] == f'"sha256:{entry.sha256}"'


# --- uploads ---


def test_uploads_are_proven_and_bounded(http, local):
    wrong = http.put(f"/v1/blobs/{sha(b'promised')}", content=b"delivered")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "corrupt_blob")
    assert sha(b"delivered") in wrong.json()["error"]["message"]
    large = http.put(f"/v1/blobs/{sha(b'x')}", content=iter([b"x" * 60_000] * 3))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    assert list(local.store.staging.iterdir()) == []
    assert http.put("/v1/blobs/../../evil", content=b"x").status_code in (404, 405)
    assert http.put("/v1/blobs/sha256:zz", content=b"x").status_code == 400


def test_a_push_says_what_is_missing(http, local, base, tmp_path):
    folder = Adapter().write(tmp_path / "a")
    answer = http.post("/v1/adapters/x/versions", json=proposal(folder, base))
    assert answer.status_code == 409
    assert sorted(answer.json()["error"]["detail"]["digests"]) == sorted(sha(p.read_bytes()) for p in folder.iterdir())
    upload(http, folder)
    first = http.post("/v1/adapters/x/versions", json=proposal(folder, base))
    again = http.post("/v1/adapters/x/versions", json=proposal(folder, base))
    assert (first.status_code, first.json()["number"], first.json()["pushed"]) == (201, 1, True)
    assert (again.status_code, again.json()["number"], again.json()["pushed"]) == (200, 1, False)
    assert list(local.store.staging.iterdir()) == []
    assert local.verify() == []


def test_the_server_checks_for_itself(http, local, base, tmp_path):
    """A client that skips its own check gains nothing: kinds, shapes and other bases are refused on arrival."""
    for change, reason in (
        ({"config": {"use_dora": True}}, "DoRA"),
        ({"config": {"r": 9}}, "expected [9, 8]"),
        ({"config": {"peft_type": "IA3"}}, "peft_type is 'IA3'"),
    ):
        folder = Adapter(**change).write(tmp_path / reason[:4])
        upload(http, folder)
        answer = http.post("/v1/adapters/x/versions", json=proposal(folder, base))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_refused")
        assert reason in answer.json()["error"]["message"]
    folder = Adapter().write(tmp_path / "other", make_receipt(base))
    upload(http, folder)
    other = proposal(folder, base)
    other["base"]["fingerprint"] = "sha256:" + "1" * 64
    assert "trained on base" in http.post("/v1/adapters/x/versions", json=other).json()["error"]["message"]
    assert local.list() == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"files": [{"path": "../evil", "sha256": "0" * 64, "bytes": 1}]}, 400),
        ({"files": [{"path": "a", "sha256": "0" * 64, "bytes": 1}] * 2}, 400),
        ({"files": [{"path": p, "sha256": "0" * 64, "bytes": 1} for p in ("a", "a/b")]}, 400),
        ({"base": "/etc"}, 400),
        ({"base": None}, 400),
        ({"files": []}, 422),
        ({"message": 3}, 400),
    ],
)
def test_proposals_that_cannot_be(http, local, base, tmp_path, change, status):
    answer = http.post("/v1/adapters/x/versions", json=proposal(Adapter().write(tmp_path / "a"), base) | change)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert local.list() == []


def test_a_damaged_blob_is_asked_for_again(http, local, base, tmp_path):
    folder = Adapter().write(tmp_path / "a")
    version = local.push("x", folder, base=base)
    entry = local.manifest(version.digest).files[1]
    blob = local.store.place.path(entry.sha256)
    blob.write_bytes(b"x" * entry.bytes)
    answer = http.post("/v1/adapters/y/versions", json=proposal(folder, base))
    assert answer.json()["error"]["detail"]["digests"] == [f"sha256:{entry.sha256}"]


# --- the client ---


def test_the_client_trusts_no_server(base, tmp_path):
    """A server that hands out other bytes under the right name: the client refuses them and keeps nothing."""
    with Registry(tmp_path / "registry") as local, served(local) as url, RemoteRegistry(url) as remote:
        version = local.push("x", Adapter().write(tmp_path / "a"), base=base)
        entry = local.manifest(version.digest).files[1]
        local.store.place.path(entry.sha256).write_bytes(b"x" * entry.bytes)
        with pytest.raises(CorruptBlob, match=entry.sha256):
            remote.fetch(version.digest, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_limits_reach_the_client_as_they_are(local, base, tmp_path):
    with served(local) as url, RemoteRegistry(url) as remote:
        folder = Adapter().write(tmp_path / "a")
        (folder / "README.md").write_bytes(b"x" * 200_000)
        with pytest.raises(TooLarge, match="100,000 bytes"):
            remote.push("x", folder, base=base)
        refused = Adapter(config={"use_dora": True}).write(tmp_path / "b")
        with pytest.raises(InvalidAdapter) as caught:
            remote.push("x", refused, base=base)
        assert len(caught.value.reasons) == 1


def test_no_server_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with RemoteRegistry(f"http://127.0.0.1:{port}") as remote, pytest.raises(RemoteError, match="does not answer"):
        remote.list()


def test_another_kind_of_server(tmp_path):
    app = Starlette(routes=[Route("/v1/resolve", lambda request: PlainTextResponse("hello"))])
    with serving(app) as url, RemoteRegistry(url) as remote:
        with pytest.raises(RemoteError, match="did not answer in JSON"):
            remote.resolve("a")
        with pytest.raises(RemoteError, match="404"):
            remote.list()


@pytest.mark.parametrize("answer", [{}, [], None, "x"])
def test_an_answer_of_another_shape_is_a_remote_error(answer):
    told = [Route(path, lambda request: JSONResponse(answer)) for path in ("/v1/adapters", "/v1/aliases")]
    app = Starlette(routes=told)
    with serving(app) as url, RemoteRegistry(url) as remote:
        for ask, key in ((remote.list, "data"), (remote.aliases, "aliases")):
            with pytest.raises(RemoteError, match=f"without '{key}'"):
                ask()


def test_open_registry_takes_both(tmp_path):
    with (
        open_registry(tmp_path / "a") as folder,
        open_registry("http://127.0.0.1:1/x") as remote,
        open_registry() as home,
    ):
        assert isinstance(folder, Registry)
        assert isinstance(remote, RemoteRegistry)
        assert isinstance(home, Registry)
        assert home.root == tmp_path / "home" / "registry"


# --- tokens ---


def test_tokens(local, base, tmp_path, monkeypatch):
    with served(local, read_tokens("# ours\nada secret-1\n\nsecret-2\n")) as url:
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-2"}):
            answer = httpx.get(f"{url}/v1/adapters", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["type"] == "authentication_error"
        with RemoteRegistry(url) as nobody, pytest.raises(Unauthorized, match="token"):
            nobody.push("x", Adapter().write(tmp_path / "a"), base=base)
        monkeypatch.setenv("LORAPLEX_REGISTRY_TOKEN", "secret-1")
        with RemoteRegistry(url) as ada:
            assert ada.push("x", Adapter().write(tmp_path / "a"), base=base).created_by == "ada"
            assert ada.promote("x:1", "production").who == "ada"
        with RemoteRegistry(url, "secret-2") as other:
            assert other.rollback("x@production", to=1).moved is False
            assert other.promote("x:1", "staging").who == "http"


# --- the command ---


def test_answers_do_not_wait_for_acknowledgements():
    """Head and body of an answer are two packets; without TCP_NODELAY the second came 40 ms after the first."""
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_serve_in_a_process(tmp_path, base):
    """`registry serve` starts, answers, says so when its port is taken, and ends on a signal."""
    code = "from loraplex_registry.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "--registry", str(tmp_path / "registry"), "serve", "--port"]
    server = subprocess.Popen([*command, "0"], env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = server.stderr.readline().split()[-1]
        with RemoteRegistry(url) as remote:
            assert remote.push("x", Adapter().write(tmp_path / "a"), base=base).number == 1
        taken = [*command, url.rpartition(":")[2]]
        second = subprocess.run(taken, env=environment, capture_output=True, text=True, timeout=30)
        assert second.returncode == 1
        assert second.stderr == f"error: cannot listen on {url.removeprefix('http://')}: Address already in use\n"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
        server.stderr.close()
