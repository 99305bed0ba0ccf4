"""gc: what it removes, what it never does, and pushes under way; in a folder and behind a URL."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest

from loraplex_registry.blobs import write_durably
from loraplex_registry.errors import (
    CorruptBlob,
    DeletedVersion,
    InvalidRequest,
)
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry

from .conftest import Adapter, make_receipt, served


def blobs(store):
    return {path.name for path in store.place.blobs.rglob("*") if path.is_file()}


def put(store, data: bytes, age_seconds: float) -> str:
    """A blob that no version refers to."""
    store.staging.mkdir(parents=True, exist_ok=True)
    entry = write_durably(iter([data]), store.staging / "stray")
    store.publish(store.staging / "stray", entry.sha256)
    os.utime(store.place.path(entry.sha256), (time.time() - age_seconds, time.time() - age_seconds))
    return entry.sha256


def test_what_versions_hold_stays(push, registry, store):
    push(), push(seed=1)
    before = blobs(store)
    found = registry.gc(grace_seconds=0)
    assert (found.deleted, found.purged, found.files, found.bytes, found.dry_run) == ((), (), 0, 0, False)
    assert blobs(store) == before
    assert registry.verify() == []


def test_blobs_of_nobody_go_once_they_are_old(push, registry, store):
    push()
    held = blobs(store)
    old, young = put(store, b"12345", 3 * 3600), put(store, b"new", 3600)
    found = registry.gc(dry_run=True)
    assert (found.files, found.bytes, found.dry_run) == (1, 5, True)
    assert blobs(store) == held | {old, young}
    assert registry.gc().files == 1
    assert blobs(store) == held | {young}
    assert registry.gc(grace_seconds=1800).files == 1
    assert blobs(store) == held


def test_a_deleted_version_is_purged_after_the_grace(push, registry, store, tmp_path):
    version, shared = push(), push("copy")
    held = blobs(store)
    other = push(seed=1)
    only_its_own = blobs(store) - held
    for ref in (version, other):
        registry.delete(str(ref))
    assert registry.gc().purged == ()  # deleted a moment ago
    dry = registry.gc(grace_seconds=0, dry_run=True)
    assert dry.purged == ("quotes-tagger:1", "quotes-tagger:2")
    registry.restore("quotes-tagger:2"), registry.delete("quotes-tagger:2")  # the dry run changed nothing
    found = registry.gc(grace_seconds=0)
    assert (found.purged, found.files, found.bytes) == (dry.purged, dry.files, dry.bytes)
    assert dry.files == len(only_its_own)
    assert blobs(store) == held
    assert registry.gc(grace_seconds=0).purged == ()  # once
    assert registry.pull("copy", tmp_path / "out") == shared
    for act in (registry.resolve, registry.restore):
        with pytest.raises(DeletedVersion, match="only a push of the same files brings it back") as caught:
            act("quotes-tagger:2")
        assert caught.value.purged
    again = push(seed=1)
    assert (again.number, again.restored) == (2, True)
    assert registry.pull("quotes-tagger:2", tmp_path / "again") == other
    assert registry.verify() == []
    registry.delete("quotes-tagger:2")
    assert registry.restore("quotes-tagger:2").number == 2  # it was purged before, and is whole again


def test_keep_deletes_older_versions_but_none_that_an_alias_needs(push, registry, tmp_path):
    for seed in range(5):
        push(seed=seed)
    push("other")
    registry.promote("quotes-tagger:1", "paper")
    registry.promote("quotes-tagger:2", "production")
    registry.promote("quotes-tagger:4", "production")
    assert registry.gc(keep=1, dry_run=True).deleted == ("quotes-tagger:3",)
    assert len(registry.versions("quotes-tagger")) == 5
    found = registry.gc(keep=1)
    assert (found.deleted, found.purged) == (("quotes-tagger:3",), ())
    assert [version.number for version in registry.versions("quotes-tagger")] == [1, 2, 4, 5]
    assert registry.rollback("quotes-tagger@production").to_number == 2
    registry.restore("quotes-tagger:3")
    assert registry.gc(grace_seconds=0, keep=4).deleted == ()  # 1 is beyond the newest four, but an alias holds it
    found = registry.gc(grace_seconds=0, keep=1)
    assert found.deleted == found.purged == ("quotes-tagger:3", "quotes-tagger:4")
    assert registry.pull("quotes-tagger@paper", tmp_path / "out").number == 1
    assert registry.verify() == []


def test_a_damaged_manifest_stops_gc(push, registry, store):
    version = push()
    gone = push(seed=1)
    registry.delete(str(gone))
    stray = put(store, b"stray", 9999)
    manifest = store.place.path(version.digest.removeprefix("sha256:"))
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    with pytest.raises(CorruptBlob, match=r"manifest\.json"):
        registry.gc(grace_seconds=0)
    assert stray in blobs(store)
    manifest.write_bytes(whole)
    assert registry.restore(str(gone)).number == 2  # nor was the deleted version given up
    assert registry.verify() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grace_seconds": -1}, "grace_seconds is -1, expected 0 to 315,360,000"),
        ({"grace_seconds": 10**12}, "grace_seconds is 1000000000000, expected 0 to 315,360,000"),
        ({"keep": 0}, "keep is 0, expected 1 or more"),
    ],
)
def test_options_that_cannot_be(registry, options, said):
    with pytest.raises(InvalidRequest, match=said) as caught:
        registry.gc(**options)
    assert caught.value.param == next(iter(options))


KILLED = """
import os, pathlib, signal, sys
from loraplex_registry.registry import Registry
root, fatal_call = sys.argv[1], int(sys.argv[2])
calls = 0
real = pathlib.Path.unlink
def unlink(*arguments, **options):
    global calls
    calls += 1
    if calls == fatal_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
pathlib.Path.unlink = unlink
Registry(root).gc(grace_seconds=0)
"""


@pytest.mark.parametrize("registry", ["folder"], indirect=True)
def test_a_killed_gc_is_taken_up_by_the_next(push, registry, store):
    """SIGKILL before the n-th removal: what is held is whole, the lock is free, and the next round removes the rest."""
    push("kept")
    held = blobs(store)
    push(seed=1)
    for fatal_call in (1, 2):  # its weights and its manifest are its own
        push(seed=1)
        registry.delete("quotes-tagger:1")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        killed = subprocess.run([sys.executable, "-c", KILLED, str(registry.root), str(fatal_call)], env=environment)
        assert killed.returncode == -signal.SIGKILL
        assert len(blobs(store) - held) == 3 - fatal_call
        with pytest.raises(DeletedVersion, match="only a push of the same files"):
            registry.restore("quotes-tagger:1")
        assert registry.verify() == []
        assert registry.gc(grace_seconds=0).files == 3 - fatal_call
        assert blobs(store) == held


def test_gc_during_pushes_breaks_none(registry, base, tmp_path):
    """20 adapters are pushed, deleted and pushed again by four, while gc without any grace runs over and over.

    The second push finds its blobs there, going, or, where it waits for that, gone. Without the lock, some lose a blob
    between its rename and the row.
    """
    done, purged = Event(), []

    def collect():
        while not done.is_set():
            purged.extend(registry.gc(grace_seconds=0).purged)

    def work(seed):
        folder = Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base))
        first = registry.push("x", folder, base=base)
        registry.delete(str(first))
        while seed % 5 == 0 and str(first) not in purged and collector.is_alive():
            time.sleep(0.01)
        again = registry.push("x", folder, base=base)
        assert (again.number, again.restored) == (first.number, True)

    collector = Thread(target=collect)
    collector.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(20)))
    finally:
        done.set()
        collector.join()
    assert registry.verify() == []
    assert [version.number for version in registry.versions("x")] == list(range(1, 21))


def test_a_push_uploads_again_what_another_took_with_it(base, tmp_path):
    """Two push the same files at once; one of them ends, its version is deleted and collected, and with it went what
    the other had uploaded already."""
    folder = Adapter().write(tmp_path / "a", make_receipt(base))
    with Registry(tmp_path / "registry") as local, served(local) as url, RemoteRegistry(url) as remote:
        sent = []

        def progress(sent_bytes: int) -> None:
            sent.append(sent_bytes)
            if len(sent) == 3:  # the last file is on its way
                local.delete(str(remote.push("other", folder, base=base)))
                local.gc(grace_seconds=0)

        assert str(remote.push("x", folder, base=base, progress=progress)) == "x:1"
        assert len(sent) > 3
        assert local.verify() == []


def test_a_push_uploads_what_gc_removed_since_it_asked(base, tmp_path):
    """Configuration and receipt were there when the client asked what is missing, and are gone when it asks again."""
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base)) for seed in range(2)]
    with Registry(tmp_path / "registry") as local, served(local) as url, RemoteRegistry(url) as remote:
        local.push("old", folders[0], base=base)
        local.delete("old:1")
        sent = []

        def progress(sent_bytes: int) -> None:
            sent.append(sent_bytes)
            local.gc(grace_seconds=0)

        version = remote.push("x", folders[1], base=base, progress=progress)
        assert len(sent) == 3  # the weights at first, then the two
        assert sum(sent) == version.bytes
        assert local.verify() == []
