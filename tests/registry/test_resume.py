"""Uploads that are cut off go on where they stopped: over raw sockets, and by the client through a bad network."""

import hashlib
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest

from loraplex_registry import remote
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry
from loraplex_registry.uploads import Upload

from .conftest import Adapter, served

FILE = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(FILE).hexdigest()
BLOB, UPLOAD = f"/v1/blobs/sha256:{SHA256}", f"/v1/uploads/sha256:{SHA256}"
TOKENS = {"secret-ada": "ada", "secret-bob": "bob"}


@pytest.fixture
def local(tmp_path):
    with Registry(tmp_path / "registry") as local:
        yield local


def received(http: httpx.Client) -> int:
    return http.get(UPLOAD).raise_for_status().json()["received_bytes"]


def send_and_cut(http: httpx.Client, sent: bytes, offset: int = 0) -> None:
    """A PUT whose connection is gone after some bytes."""
    url, expected = http.base_url, offset + len(sent)
    head = f"PUT {BLOB} HTTP/1.1\r\nHost: x\r\nUpload-Offset: {offset}\r\nContent-Length: {len(FILE) - offset}\r\n"
    head += "".join(f"{key}: {value}\r\n" for key, value in http.headers.items() if key == "authorization")
    with socket.create_connection((url.host, url.port)) as raw:
        raw.sendall(head.encode() + b"\r\n" + sent)
        wait_for(lambda: received(http) == expected)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within ten seconds")


def test_an_upload_goes_on_where_it_was_cut_off(local):
    with served(local) as url, httpx.Client(base_url=url) as http:
        assert received(http) == 0
        send_and_cut(http, FILE[:1000])
        send_and_cut(http, FILE[1000:700_000], 1000)
        wrong = http.put(BLOB, content=FILE[5:], headers={"Upload-Offset": "5"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "wrong_offset")
        assert wrong.json()["error"]["detail"] == {"offset": 5, "received_bytes": 700_000}
        odd = http.put(BLOB, content=FILE, headers={"Upload-Offset": "-1"})
        assert (odd.status_code, odd.json()["error"]["param"]) == (400, "Upload-Offset")
        assert received(http) == 700_000, "what is refused spoils nothing"
        assert http.put(BLOB, content=FILE[700_000:], headers={"Upload-Offset": "700000"}).status_code == 201
        assert received(http) == 0
        assert [path.read_bytes() for path in local.store.staging.iterdir()] == [FILE]


def test_bytes_that_do_not_fit_what_came_are_refused_and_forgotten(local):
    with served(local) as url, httpx.Client(base_url=url) as http:
        send_and_cut(http, b"other" * 200)
        wrong = http.put(BLOB, content=FILE[1000:], headers={"Upload-Offset": "1000"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "corrupt_blob")
        assert received(http) == 0
        assert http.put(BLOB, content=FILE).status_code == 201, "from the beginning"


def test_what_one_left_unfinished_is_not_anothers(local):
    with served(local, TOKENS) as url:
        ada, bob = (httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}) for token in TOKENS)
        with ada, bob:
            send_and_cut(ada, b"spoilt by ada")
            assert received(bob) == 0
            send_and_cut(bob, FILE[:5000])
            assert bob.put(BLOB, content=FILE[5000:], headers={"Upload-Offset": "5000"}).status_code == 201
            assert received(ada) == 13


def test_the_same_file_may_come_twice_at_once(local):
    """As from two pushes that share it. Both are whole; the second of them could not be gone on with."""
    with served(local) as url, httpx.Client(base_url=url) as http:
        begun, go_on = threading.Event(), threading.Event()

        def slowly():
            yield FILE[:1000]
            begun.set()
            go_on.wait(20)
            yield FILE[1000:]

        answers = []
        first = threading.Thread(target=lambda: answers.append(http.put(BLOB, content=slowly()).status_code))
        first.start()
        begun.wait(20)
        wait_for(lambda: received(http) == 1000)
        assert http.put(BLOB, content=FILE).status_code == 201
        go_on.set()
        first.join()
        assert answers == [201]
        assert [path.read_bytes() for path in local.store.staging.iterdir()] == [FILE]


def test_an_upload_that_has_finished_leaves_the_next_of_the_same_file_alone(local):
    """Between its end and its leaving, the next may have begun under the same name."""
    first, second = ExitStack(), ExitStack()
    with second:
        with first:
            upload = first.enter_context(Upload(local.store, SHA256, len(FILE), "ada"))
            upload.write(FILE)
            upload.finish()
            upload = second.enter_context(Upload(local.store, SHA256, len(FILE), "ada"))
        upload.write(FILE)
        upload.finish()
    assert [path.read_bytes() for path in local.store.staging.iterdir()] == [FILE]


@contextmanager
def cutting(url: str, *after_bytes: int):
    """A way to a server whose connections end, one after the other, after so many bytes to it; then they hold."""
    to, cuts, passed = urlsplit(url), list(after_bytes), []

    def copy(source: socket.socket, target: socket.socket, most: float, count: list[int]) -> None:
        with suppress(OSError):
            while count[0] < most and (data := source.recv(int(min(most - count[0], 65536)))):
                target.sendall(data)
                count[0] += len(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((to.hostname, to.port))
                sockets.enter_context(client)
                sockets.enter_context(server)
                passed.append([0])
                most = cuts.pop(0) if cuts else math.inf
                threading.Thread(target=copy, args=(client, server, most, passed[-1]), daemon=True).start()
                threading.Thread(target=copy, args=(server, client, math.inf, [0]), daemon=True).start()

    with ExitStack() as sockets, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", passed


def test_a_push_through_a_network_that_cuts_sends_nothing_twice(local, base, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.1,) * 4)
    adapter = Adapter(rank=1, targets=("q_proj",))
    folder = adapter.write(tmp_path / "a")
    (folder / "notes.txt").write_bytes(FILE * 6)
    total_bytes, told = sum(path.stat().st_size for path in folder.iterdir()), []
    with served(local) as url, cutting(url, 2_000_000, 2_000_000) as (bad, passed):
        with RemoteRegistry(bad) as registry:
            version = registry.push("x", folder, base=base, progress=told.append)
        assert version.number == 1
        assert local.verify() == []
    assert sum(told) == total_bytes
    assert len(passed) > 2, "the network cut, or this test proves nothing"
    assert sum(count for (count,) in passed) < total_bytes + 500_000
