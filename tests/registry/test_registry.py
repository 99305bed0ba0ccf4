"""What only a registry in a folder shows: processes at once, sudden ends, permissions, broken catalogs."""

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplex_registry.errors import (
    StoreUnavailable,
)
from loraplex_registry.manifest import sha256_of
from loraplex_registry.registry import Registry

from .conftest import PUSHER, Adapter, make_receipt, run_python


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def test_blobs_are_shared(push, registry):
    push("one")
    files = {path for path in registry.store.place.blobs.rglob("*") if path.is_file()}
    push("two")
    assert {path for path in registry.store.place.blobs.rglob("*") if path.is_file()} == files


def test_the_ledger_cannot_be_rewritten(push, registry):
    push()
    registry.promote("quotes-tagger:1", "production")
    with sqlite3.connect(registry.root / "catalog.sqlite3") as db:
        for statement in ("DELETE FROM alias_moves", "UPDATE alias_moves SET to_number = 9"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)
    db.close()


def test_the_ledger_of_deletions_says_who_did_what(push, registry, base, tmp_path):
    push()
    registry.delete("quotes-tagger:1", "wrong data", who="ada")
    registry.restore("quotes-tagger:1", who="bob")
    registry.delete("quotes-tagger:1", who="cyd")
    push()
    with sqlite3.connect(registry.root / "catalog.sqlite3") as db:
        rows = db.execute("SELECT action, who, reason FROM deletions ORDER BY id").fetchall()
        for statement in ("DELETE FROM deletions", "UPDATE deletions SET who = 'eve'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)
    db.close()
    assert rows[:3] == [("delete", "ada", "wrong data"), ("restore", "bob", ""), ("delete", "cyd", "")]
    assert (rows[3][0], rows[3][2]) == ("restore", "pushed again")


def test_a_manifest_of_another_release_is_a_fault(push, registry):
    push()
    alien = b'{"format":"loraplex.adapter/99"}'
    digest = sha256_of(alien)
    (registry.root / "alien").write_bytes(alien)
    registry.store.publish(registry.root / "alien", digest.removeprefix("sha256:"))
    with sqlite3.connect(registry.root / "catalog.sqlite3") as db:
        db.execute("UPDATE versions SET digest = ?", (digest,))
    db.close()
    (fault,) = registry.verify()
    assert (fault.version, fault.path) == ("quotes-tagger:1", "manifest.json")
    assert "unreadable: manifest format 'loraplex.adapter/99'" in fault.what


# --- many at once, and sudden ends ---


def test_numbers_have_no_gaps_when_processes_push_at_once(base, tmp_path):
    """Eight processes open a registry that does not exist yet, and push three each, one of them the same for all."""
    common = Adapter(seed=999).write(tmp_path / "common")
    pushers = []
    for process in range(8):
        folders = [Adapter(seed=process * 10 + i).write(tmp_path / f"a{process}-{i}") for i in range(2)]
        arguments = (tmp_path / "registry", base, *folders, common)
        pushers.append(run_python(PUSHER, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for pusher in pushers:
        _, errors = pusher.communicate(timeout=60)
        assert pusher.returncode == 0, errors
    with Registry(tmp_path / "registry") as registry:
        assert [version.number for version in registry.versions("quotes-tagger")] == list(range(1, 18))
        assert registry.verify() == []


def test_threads_push_promote_and_read_at_once(registry, base, tmp_path):
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}") for seed in range(16)]
    registry.push("x", folders[0], base=base)

    def work(folder):
        version = registry.push("x", folder, base=base)
        registry.promote(str(version), "production")
        assert registry.resolve("x@production").number >= 1
        return version.number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, folders)) == list(range(1, 17))
    moves = registry.history("x", "production")
    assert [move.from_number for move in moves[1:]] == [move.to_number for move in moves[:-1]]


KILLED = """
import os, pathlib, signal, sys
from loraplex_registry.manifest import sha256_of
from loraplex_registry.registry import Registry
parent, base, folder = sys.argv[1:]

def push(root, fatal_call):
    calls = 0
    def counted(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for owner, name in ((os, "fsync"), (os, "link"), (pathlib.Path, "replace"), (pathlib.Path, "mkdir")):
        setattr(owner, name, counted(getattr(owner, name)))
    with Registry(root) as registry:
        registry.push("x", folder, base=base)
    os._exit(0)

ended = []
while 0 not in ended:
    children = []
    for fatal_call in range(len(ended) + 1, len(ended) + 9):
        pid = os.fork()
        if pid == 0:
            push(f"{parent}/r{fatal_call}", fatal_call)
        children.append(pid)
    ended += [os.waitpid(pid, 0)[1] for pid in children]
print(*ended)
"""


def test_killed_at_every_step_the_store_stays_whole(base, tmp_path):
    """SIGKILL before the n-th flush, link, rename or mkdir of a first push, for every n: nothing half is ever seen."""
    folder = Adapter().write(tmp_path / "adapter", make_receipt(base))
    output, _ = run_python(KILLED, tmp_path, base, folder, stdout=subprocess.PIPE).communicate(timeout=60)
    ended = [int(status) for status in output.split()]
    steps = ended.index(0)
    assert steps > 15
    assert ended == [signal.SIGKILL] * steps + [0] * (len(ended) - steps)

    def examine(step):
        with Registry(tmp_path / f"r{step}") as registry:
            assert registry.verify() == []
            assert registry.list() == []
            assert registry.push("x", folder, base=base).number == 1
            assert registry.verify() == []

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(examine, range(1, steps + 1)))


def test_killed_at_any_moment(base, tmp_path):
    """Processes that push without end, killed after random times, share one registry: it verifies clean after each."""
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}") for seed in range(40)]
    root = tmp_path / "registry"
    for round_ in range(6):
        process = run_python(PUSHER, root, base, *folders[round_ * 5 :], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it is pushing by now
        time.sleep(0.003 * round_)
        process.kill()
        process.communicate()
        with Registry(root) as registry:
            assert registry.verify() == []
            numbers = [version.number for version in registry.versions("quotes-tagger")]
            assert numbers == list(range(1, len(numbers) + 1))


def test_leftovers_are_swept_after_a_while(push, registry):
    push()
    fresh, old = registry.store.staging / "fresh", registry.store.staging / "old"
    for folder, age_seconds in ((fresh, 60), (old, 7 * 3600)):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        for path in (folder / "half", folder):
            os.utime(path, (time.time() - age_seconds,) * 2)
    push(seed=1)
    assert [path.name for path in registry.store.staging.iterdir()] == ["fresh"]


def test_readers_do_not_wait_for_a_writer(push, registry):
    push()
    with registry.catalog._write() as db:
        db.exec_driver_sql("UPDATE versions SET message = 'not yet'")
        started = time.perf_counter()
        assert registry.resolve("quotes-tagger").message == ""
        assert time.perf_counter() - started < 1
        db.rollback()


def test_resolve_is_fast_and_safe_from_threads(push, registry):
    for seed in range(3):
        push(seed=seed)
    registry.promote("quotes-tagger:2", "production")
    registry.resolve("quotes-tagger")
    started = time.perf_counter()
    for _ in range(300):
        registry.resolve("quotes-tagger")
    assert (time.perf_counter() - started) / 300 < 0.01  # ten times what it takes, for a busy machine
    wrong = []

    def read():
        for _ in range(50):
            if registry.resolve("quotes-tagger").number != 2:
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- folders that cannot be used ---


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreUnavailable, match="is not a folder"):
            Registry(root)


def test_not_a_catalog(tmp_path):
    (tmp_path / "catalog.sqlite3").write_text("this is no database, but long enough to look at" * 10)
    with pytest.raises(StoreUnavailable, match="file is not a database"):
        Registry(tmp_path)


def test_a_newer_catalog_is_left_alone(registry, tmp_path):
    with sqlite3.connect(registry.root / "catalog.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreUnavailable, match="schema version 99"):
        Registry(registry.root)


READER = """
import json, os, sys
from loraplex_registry.manifest import sha256_of
from loraplex_registry.registry import Registry
from loraplex_registry.errors import StoreUnavailable
root, folder, base, out = sys.argv[1:]
with Registry(out + "-warm") as warm:  # all modules are in, before this user loses the right to read them
    warm.push("x", folder, base=base)
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
registry = Registry(root)
seen = [str(registry.resolve("quotes-tagger")), len(registry.verify())]
for act in (lambda: registry.push("x", folder, base=base), lambda: registry.promote("quotes-tagger:1", "production")):
    try:
        act()
    except StoreUnavailable as error:
        seen.append(str(error))
registry.fetch(registry.resolve("quotes-tagger").digest, out + "/fetched")
print(json.dumps(seen))
"""


def test_a_read_only_registry_is_read(push, registry, base, tmp_path):
    """As a user who may read all and write nothing: reads work, a push says so in one line."""
    push()
    registry.close()
    assert not list(registry.root.glob("*-shm"))
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    closed = [path for path in tmp_path.parents if not path.stat().st_mode & 0o001]  # pytest's own, for this user alone
    for path in (tmp_path, *closed, *tmp_path.glob("base/*"), *tmp_path.glob("made/*/*")):
        path.chmod(0o755)
    every = [registry.root, *registry.root.rglob("*")]
    for path in every:
        path.chmod(0o555 if path.is_dir() else 0o444)
    arguments = (registry.root, tmp_path / "made" / "quotes-tagger-0", base, out)
    reader = run_python(READER, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = reader.communicate(timeout=30)
    for path in every:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert reader.returncode == 0, errors
    first, faults, *refusals = json.loads(output)
    assert (first, faults) == ("quotes-tagger:1", 0)
    assert len(refusals) == 2
    assert all("cannot be written" in refusal for refusal in refusals)
