"""What only a registry on an object store shows: ranges over HTTP, gc, large files, sudden ends, its errors.

That it is a registry like any other, test_contract shows.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import httpx
import pytest
from click.testing import CliRunner
from huggingface_hub import hf_hub_download

from loraplex_registry.blobs import BlobStore, write_durably
from loraplex_registry.bucket import Bucket
from loraplex_registry.cli import cli
from loraplex_registry.errors import StoreUnavailable
from loraplex_registry.manifest import FileEntry
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry, open_registry

from .conftest import PUSHER, Adapter, make_receipt, run_python, served


@pytest.fixture
def registry(bucket, tmp_path, monkeypatch):
    """Its catalog in SQLite: what is shown here is the blobs'."""
    monkeypatch.setenv("LORAPLEX_REGISTRY_STORE", bucket)
    with open_registry(tmp_path / "registry") as registry:
        assert isinstance(registry, Registry)
        yield registry


@pytest.fixture
def place(bucket) -> Bucket:
    return Bucket(bucket)


def weights(registry, version) -> FileEntry:
    return next(e for e in registry.manifest(version.digest).files if e.path == "adapter_model.safetensors")


def put(place, tmp_path, data: bytes) -> FileEntry:
    (tmp_path / "stray").unlink(missing_ok=True)
    entry = write_durably(iter([data]), tmp_path / "stray")
    place.put(tmp_path / "stray", entry.sha256)
    return entry


def test_the_folder_keeps_no_blobs(push, registry, place, tmp_path):
    version = push()
    assert {blob.sha256 for blob in place.all()} == {
        version.digest.removeprefix("sha256:"),
        *(entry.sha256 for entry in registry.manifest(version.digest).files),
    }
    assert sorted(path.name for path in registry.root.iterdir() if "sqlite3-" not in path.name) == [
        "catalog.sqlite3",
        "publish.lock",
        "staging",
    ]
    assert list(registry.store.staging.iterdir()) == []


def test_machines_share_a_database_and_a_bucket_and_nothing_else(database, bucket, base, tmp_path):
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base)) for seed in range(8)]
    machines = [Registry(tmp_path / f"machine-{i}", database=database, store=bucket) for i in range(2)]
    try:
        with ThreadPoolExecutor(8) as pool:
            pushed = list(pool.map(lambda i: machines[i % 2].push("x", folders[i], base=base), range(8)))
        assert sorted(version.number for version in pushed) == list(range(1, 9))
        for machine in machines:
            assert machine.verify() == []
            for number, version in enumerate(pushed):
                machine.fetch(version.digest, machine.root / f"out-{number}")
    finally:
        for machine in machines:
            machine.close()


def test_a_push_whose_files_went_to_another_machine(database, bucket, base, tmp_path):
    """As behind a balancer that sends each request where it likes."""
    folder = Adapter().write(tmp_path / "adapter", make_receipt(base))
    with (
        Registry(tmp_path / "one", database=database, store=bucket) as one,
        Registry(tmp_path / "two", database=database, store=bucket) as two,
        served(one) as first,
        served(two) as second,
        RemoteRegistry(first) as remote,
    ):
        real = remote._http.build_request

        def balanced(method, url, **options):
            return real(method, f"{second if method == 'PUT' else first}{url}", **options)

        remote._http.build_request = balanced
        version = remote.push("x", folder, base=base)
        assert two.pull("x", tmp_path / "out").digest == version.digest
        assert one.verify() == []


def test_a_file_over_http_whole_and_in_ranges(push, registry):
    entry = weights(registry, push())
    data = b"".join(registry.store.chunks(entry))
    with served(registry) as url, httpx.Client(base_url=url) as client:
        route = f"/v1/blobs/sha256:{entry.sha256}"
        whole = client.get(route)
        assert (whole.status_code, whole.content) == (200, data)
        assert whole.headers["etag"] == f'"sha256:{entry.sha256}"'
        for asked, start, stop in (
            ("bytes=10-19", 10, 20),
            ("bytes=-7", len(data) - 7, len(data)),
            ("bytes=5-", 5, None),
        ):
            part = client.get(route, headers={"Range": asked})
            assert (part.status_code, part.content) == (206, data[start:stop])
            assert part.headers["content-range"].endswith(f"/{len(data)}")
        assert client.get(route, headers={"Range": f"bytes={len(data)}-"}).status_code == 416
        head = client.head(route)
        assert (head.status_code, int(head.headers["content-length"])) == (200, len(data))
        assert client.get(f"/v1/blobs/sha256:{0:064}").json()["error"]["code"] == "digest_not_found"


def test_pushes_and_pulls_through_a_server(registry, base, tmp_path):
    """The second adapter shares files with the first, which the server takes from the bucket."""
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base)) for seed in range(2)]
    with served(registry) as url, RemoteRegistry(url) as remote:
        sent: list[int] = []
        versions = [remote.push("x", folder, base=base, progress=sent.append) for folder in folders]
        assert len(sent) == 3 + 1
        for version, folder in zip(versions, folders, strict=True):
            remote.pull(str(version), tmp_path / f"out-{version.number}")
            for file in folder.iterdir():
                assert (tmp_path / f"out-{version.number}" / file.name).read_bytes() == file.read_bytes()
        assert remote.verify() == []


def test_the_hubs_own_client_reads_it(push, registry, tmp_path, monkeypatch):
    version = push("ns/tagger")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with served(registry) as url:
        name = "adapter_model.safetensors"
        file = hf_hub_download("ns/tagger", name, revision="1", endpoint=url, cache_dir=tmp_path / "cache")
        entry = weights(registry, version)
        assert FileEntry.of(tmp_path / "cache" / file, entry.path) == entry


def test_gc_removes_what_nobody_holds(push, registry, place, tmp_path):
    push()
    held = {blob.sha256 for blob in place.all()}
    gone = push(seed=1)
    stray = put(place, tmp_path, b"stray")
    registry.delete(str(gone))
    assert registry.gc().files == 0  # all of it was written a moment ago
    dry = registry.gc(grace_seconds=0, dry_run=True)
    assert (dry.files, dry.purged) == (3, (str(gone),))
    assert stray.sha256 in {blob.sha256 for blob in place.all()}
    found = registry.gc(grace_seconds=0)
    assert (found.files, found.bytes) == (dry.files, dry.bytes)
    assert {blob.sha256 for blob in place.all()} == held
    assert registry.gc(grace_seconds=0).files == 0
    assert push(seed=1).restored
    assert registry.verify() == []


def test_gc_during_pushes_breaks_none(database, bucket, base, tmp_path):
    """Four push, delete and push again; another machine collects without any grace, over and over."""
    done, purged = Event(), []
    pushing = Registry(tmp_path / "one", database=database, store=bucket)
    collecting = Registry(tmp_path / "two", database=database, store=bucket)

    def collect() -> None:
        while not done.is_set():
            purged.extend(collecting.gc(grace_seconds=0).purged)

    def work(seed: int) -> None:
        folder = Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base))
        first = str(pushing.push("x", folder, base=base))
        pushing.delete(first)
        while seed % 5 == 0 and first not in purged and collector.is_alive():
            time.sleep(0.01)
        assert pushing.push("x", folder, base=base).restored

    with pushing, collecting:
        collector = Thread(target=collect)
        collector.start()
        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(work, range(12)))
        finally:
            done.set()
            collector.join()
        assert collecting.verify() == []
        assert [version.number for version in collecting.versions("x")] == list(range(1, 13))


def test_killed_at_any_moment(registry, base, tmp_path):
    """A killed push may leave objects of nobody, but never a version that is not whole."""
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}") for seed in range(15)]
    for round_ in range(3):
        process = run_python(PUSHER, registry.root, base, *folders[round_ * 5 :], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it is pushing by now
        time.sleep(0.01 * round_)
        process.kill()
        process.communicate()
        assert registry.verify() == []
    numbers = [version.number for version in registry.versions("quotes-tagger")]
    assert numbers == list(range(1, len(numbers) + 1))


LARGE = """
import re, sys
from pathlib import Path
from loraplex_registry import bucket
url, root, file, sha256 = sys.argv[1:]
bucket.PART_BYTES = 5 << 20
def peak_kib():  # not getrusage's, which begins with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
place = bucket.Bucket(url)
(Path(root) / "small").write_bytes(b"x")
place.put(Path(root) / "small", "0" * 64)  # whatever is loaded at first is
before = peak_kib()
place.put(Path(file), sha256)
place.lay(sha256, Path(root) / "laid")
print(peak_kib() - before << 10)
"""


def test_a_large_file_goes_in_parts_and_in_bounded_memory(place, bucket, tmp_path):
    data = os.urandom(1 << 20)
    entry = write_durably((data for _ in range(40)), tmp_path / "large")
    arguments = (bucket, tmp_path, tmp_path / "large", entry.sha256)
    grown_bytes, _ = run_python(LARGE, *arguments, stdout=subprocess.PIPE).communicate(timeout=120)
    assert int(grown_bytes) < 40 << 20  # four parts of 5 MiB at once, and their buffers
    assert FileEntry.of(tmp_path / "laid", "large") == FileEntry("large", entry.sha256, 40 << 20)
    assert place.size(entry.sha256) == 40 << 20


# --- errors ---


def test_a_store_that_is_away_is_one_clear_error(push, registry, base, tmp_path, monkeypatch):
    version = push()
    with monkeypatch.context() as patch:
        patch.setattr("loraplex_registry.bucket.RETRIES", {"max_retries": 0})
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with open_registry(tmp_path / "registry") as away:
            assert isinstance(away, Registry)
            folder = Adapter(seed=1).write(tmp_path / "adapter", make_receipt(base))
            for act in (
                lambda: away.push("quotes-tagger", folder, base=base),
                lambda: away.pull("quotes-tagger", tmp_path / "out"),
                away.verify,
                away.gc,
            ):
                with pytest.raises(
                    StoreUnavailable, match=r"^the store s3://adapters/team/\w+ cannot be used: .*"
                ) as it:
                    act()
                assert "\n" not in str(it.value)
                assert "hunter2" not in str(it.value)
            with served(away) as url:
                answer = httpx.get(f"{url}/v1/blobs/sha256:{weights(registry, version).sha256}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert not (tmp_path / "out").exists()
    assert push(seed=1).number == 2
    assert registry.verify() == []


def test_a_bucket_that_is_not_there(bucket, base, tmp_path):
    with Registry(tmp_path / "registry", store="s3://nowhere/x") as registry:
        with pytest.raises(StoreUnavailable, match=r"the store s3://nowhere/x cannot be used: .*NoSuchBucket"):
            registry.push("x", Adapter().write(tmp_path / "a"), base=base)
        with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
            registry.gc()
        assert registry.list() == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/x", "the store's URL begins with ftp://, expected s3://bucket/prefix, or gs:// or az://"),
        ("file:///tmp/x", "the store's URL begins with file://"),
        ("s3://key:hunter2@bucket/x", "the store's URL cannot be read, expected s3://bucket/prefix"),
        ("az://container/x?sig=hunter2", "the store's URL cannot be read"),
        ("bucket", "the store's URL cannot be read"),
        ("s3:///x", "the store's URL cannot be read"),
        ("az://container/x", "the store az://container/x cannot be used: .*Account must be specified"),
    ],
)
def test_a_url_that_cannot_be(tmp_path, monkeypatch, url, said):
    monkeypatch.setenv("LORAPLEX_REGISTRY_STORE", url)
    answer = CliRunner().invoke(cli, ["--registry", str(tmp_path), "list"])
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: ")
    assert re.search(said, answer.stderr)
    assert "hunter2" not in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreUnavailable, match=r"pip install 'loraplex\[object-store\]'"):
        Registry(tmp_path, store="s3://bucket/x")
    BlobStore(tmp_path)  # a folder needs none


def test_the_command_serves_from_a_bucket(bucket, base, tmp_path):
    words = ("--registry", tmp_path / "registry", "serve", "--port", "0", "--store", bucket)
    server = run_python("from loraplex_registry.cli import main; main()", *words, stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        assert line.startswith(f"registry {tmp_path / 'registry'}, {bucket} at http://127.0.0.1:")
        with RemoteRegistry(line.split()[-1]) as remote:
            version = remote.push("x", Adapter().write(tmp_path / "a"), base=base)
        assert version.digest.removeprefix("sha256:") in {blob.sha256 for blob in Bucket(bucket).all()}
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=20)
        assert "hunter2" not in errors
