"""Many read one content at once: it is read once, in bounded memory, and nothing outlives the last reader."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from loraplex_registry.errors import CorruptBlob
from loraplex_registry.manifest import FileEntry
from loraplex_registry.registry import Registry
from loraplex_registry.shared_reads import PIECE_BYTES, SharedReads

from .conftest import served


class Content:
    """Pieces that count how often they are read."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.reads = pieces, []

    def read(self, number: int) -> bytes:
        self.reads.append(number)
        return bytes([number]) * 10 if number < self.pieces else b""


def test_a_piece_is_read_once_for_all_who_are_there():
    content, reads, all_here = Content(20), SharedReads(), threading.Barrier(32)

    def pull(_):
        pieces = reads.pieces("a", content.read)
        first = next(pieces)
        all_here.wait()
        return [first, *pieces]

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(pull, range(32)))
    assert found == [[bytes([number]) * 10 for number in range(20)]] * 32
    assert sorted(content.reads) == list(range(21))
    assert not reads._pieces
    assert not reads._readers


def test_who_comes_after_the_last_reads_anew():
    content, reads = Content(3), SharedReads()
    assert list(reads.pieces("a", content.read)) == list(reads.pieces("a", content.read))
    assert content.reads == [0, 1, 2, 3] * 2
    left = reads.pieces("a", content.read, first=1)
    assert next(left) == bytes([1]) * 10
    left.close()  # a client that hung up
    assert not reads._pieces
    assert not reads._readers


def test_memory_is_bounded_and_who_is_late_reads_for_himself():
    content, reads = Content(50), SharedReads(kept=4)
    late = reads.pieces("a", content.read)
    assert next(late) == bytes(10)
    for _ in reads.pieces("a", content.read):
        assert len(reads._pieces) <= 4
    assert list(late) == [bytes([number]) * 10 for number in range(1, 50)]
    assert content.reads.count(1) == 2


def test_an_error_is_told_and_not_kept():
    content, reads = Content(2), SharedReads()
    other = reads.pieces("a", content.read)
    next(other)

    def fail(number):
        raise OSError("the disk is gone")

    ill = reads.pieces("a", fail, first=1)
    with pytest.raises(OSError, match="the disk is gone"):
        next(ill)
    assert len(list(other)) == 1


def test_pulls_over_http_share_one_read_of_the_store(tmp_path, monkeypatch):
    """Each client holds its answer open until all have theirs: the file is larger than what sockets take in."""
    data = os.urandom(12 * PIECE_BYTES + 5)
    sha256, clients = hashlib.sha256(data).hexdigest(), 12
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: reads.append(at) or pread(file, size, at))
    with Registry(tmp_path / "registry") as local, served(local) as url:
        place = local.store.place.path(sha256)
        place.parent.mkdir(parents=True)
        place.write_bytes(data)
        all_here = threading.Barrier(clients)

        def pull(_):
            with httpx.stream("GET", f"{url}/v1/blobs/sha256:{sha256}", timeout=60) as answer:
                all_here.wait()
                return hashlib.sha256(answer.read()).hexdigest()

        with ThreadPoolExecutor(clients) as pool:
            assert list(pool.map(pull, range(clients))) == [sha256] * clients
        assert sorted(at for at in reads if at < len(data)) == [number * PIECE_BYTES for number in range(13)]
        part = httpx.get(f"{url}/v1/blobs/sha256:{sha256}", headers={"Range": f"bytes=5-{PIECE_BYTES + 9}"})
        assert (part.status_code, part.content) == (206, data[5 : PIECE_BYTES + 10])
        assert part.headers["content-range"] == f"bytes 5-{PIECE_BYTES + 9}/{len(data)}"
        head = httpx.head(f"{url}/v1/blobs/sha256:{sha256}")
        assert (head.headers["content-length"], head.content) == (str(len(data)), b"")
        place.write_bytes(data[:-1] + b"!")
        with pytest.raises(CorruptBlob):
            list(local.store.chunks(FileEntry("a", sha256, len(data))))
