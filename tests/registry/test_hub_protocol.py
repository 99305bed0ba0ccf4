"""Stock Hub clients against this registry: huggingface_hub, the `hf` command, and peft, over real HTTP."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from serving import serving
from tiny import make_adapter
from tiny import make_base as make_torch_base

from loraplex_registry.http import create_app
from loraplex_registry.registry import Registry

from .conftest import Adapter, make_receipt, served

CARD = b"".join(b"line %d of the card\n" % line for line in range(150_000))  # three chunks of the store


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The client of this process may use the network, that is 127.0.0.1, and forgets its connections afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def local(tmp_path, base):
    """ns/tagger with versions 1 (in production, with a card) and 2."""
    first = Adapter().write(tmp_path / "first", make_receipt(base))
    (first / "README.md").write_bytes(CARD)
    (first / "notes").mkdir()
    (first / "notes" / "resolve").mkdir()
    (first / "notes" / "resolve" / "seen.txt").write_text("a folder called as a route")
    (first / "notes" / "50% é #1?.md").write_text("a name that needs quoting")
    with Registry(tmp_path / "registry") as registry:
        registry.push("ns/tagger", first, base=base, message="the first\nwith a card")
        registry.promote("ns/tagger:1", "production")
        registry.push("ns/tagger", Adapter(seed=1).write(tmp_path / "second"), base=base)
        yield registry


@pytest.fixture
def hub(local):
    with served(local) as url:
        yield HfApi(endpoint=url, token=False)


@pytest.fixture
def web():
    with httpx.Client(follow_redirects=True) as client:
        yield client


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub-cache"


def commit(local, number: int) -> str:
    return local.resolve(f"ns/tagger:{number}").digest.removeprefix("sha256:")[:40]


def told(files) -> dict[str, tuple[int, str]]:
    """What the client was told of files: path → size and sha256."""
    return {one.rfilename: (one.size, one.lfs.sha256) for one in files if one.lfs}


def kept(local) -> dict[str, tuple[int, str]]:
    """What the manifest of the version in production says of its files."""
    manifest = local.manifest(local.resolve("ns/tagger").digest)
    return {entry.path: (entry.bytes, entry.sha256) for entry in manifest.files}


def content(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- names ---


@pytest.mark.parametrize(
    ("revision", "number"), [(None, 1), ("main", 1), ("production", 1), ("1", 1), ("2", 2), ("v2", 2)]
)
def test_revisions(hub, local, revision, number):
    found = hub.model_info("ns/tagger", revision=revision)
    assert (found.id, found.sha) == ("ns/tagger", commit(local, number))
    assert re.fullmatch("[0-9a-f]{40}", found.sha)
    assert hub.model_info("ns/tagger", revision=found.sha).sha == found.sha
    digest = local.resolve(f"ns/tagger:{number}").digest
    assert hub.model_info("ns/tagger", revision=digest).sha == found.sha


def test_main_is_what_the_bare_name_stands_for(hub, local, base, tmp_path):
    for seed in (0, 1):
        local.push("plain", Adapter(seed=seed).write(tmp_path / f"plain-{seed}"), base=base)
    newest = local.resolve("plain:2").digest.removeprefix("sha256:")[:40]
    assert hub.model_info("plain").sha == newest
    local.promote("plain:1", "production")
    assert hub.model_info("plain").sha != newest


def test_what_never_moves_is_not_hidden_by_an_alias(hub, local):
    second = commit(local, 2)
    for alias in (second, "main", "v2"):
        local.promote("ns/tagger:1", alias)
    local.promote("ns/tagger:2", "production")
    assert hub.model_info("ns/tagger", revision=second).sha == second
    assert hub.model_info("ns/tagger", revision="main").sha == second
    assert hub.model_info("ns/tagger", revision="v2").sha == commit(local, 1)  # a word that somebody chose


def test_model_info(hub, local):
    found = hub.model_info("ns/tagger", files_metadata=True)
    assert told(found.siblings) == kept(local)
    assert (found.author, found.library_name, found.private) == ("ns", "peft", False)
    assert "base_model:adapter:tiny/base" in found.tags
    assert found.last_modified == local.resolve("ns/tagger").created_at
    assert [one.size for one in hub.model_info("ns/tagger").siblings] == [None] * len(kept(local))


def test_refs_and_commits(hub, local):
    first, second = commit(local, 1), commit(local, 2)
    refs = hub.list_repo_refs("ns/tagger", include_pull_requests=True)
    assert {one.name: one.target_commit for one in refs.branches} == {"main": first, "production": first}
    assert {one.name: (one.ref, one.target_commit) for one in refs.tags} == {
        "v1": ("refs/tags/v1", first),
        "v2": ("refs/tags/v2", second),
    }
    assert refs.pull_requests == []
    local.promote("ns/tagger:2", "production")
    assert {one.target_commit for one in hub.list_repo_refs("ns/tagger").branches} == {second}
    history = hub.list_repo_commits("ns/tagger", revision="2")
    assert [one.commit_id for one in history] == [second, first]
    assert (history[1].title, history[1].message) == ("the first", "with a card")
    assert [one.commit_id for one in hub.list_repo_commits("ns/tagger", revision="1")] == [first]


def test_trees(hub, local):
    everything = list(hub.list_repo_tree("ns/tagger", recursive=True))
    found = {one.path: one for one in everything if isinstance(one, huggingface_hub.hf_api.RepoFile)}
    assert told(found.values()) == kept(local)
    card, sha256 = found["README.md"], hashlib.sha256(CARD).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(CARD)}\n".encode()
    assert card.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert card.lfs
    assert card.lfs.pointer_size == len(pointer)
    assert {one.path for one in everything} - found.keys() == {"notes", "notes/resolve"}
    assert {one.path for one in hub.list_repo_tree("ns/tagger")} == {"notes", *(p for p in kept(local) if "/" not in p)}
    assert {one.path for one in hub.list_repo_tree("ns/tagger", "notes")} == {"notes/resolve", "notes/50% é #1?.md"}
    assert [one.path for one in hub.list_repo_tree("ns/tagger", "notes/resolve")] == ["notes/resolve/seen.txt"]
    with pytest.raises(EntryNotFoundError):
        list(hub.list_repo_tree("ns/tagger", "notes/none"))


def test_paths(hub):
    asked = ["README.md", "notes", "none", "../catalog.sqlite3"]
    found = hub.get_paths_info("ns/tagger", asked, revision="production")
    assert {one.path for one in found} == {"README.md", "notes"}
    assert hub.get_paths_info("ns/tagger", asked, revision="2") == []
    with pytest.raises(RevisionNotFoundError):
        hub.get_paths_info("ns/tagger", asked, revision="staging")
    url = f"{hub.endpoint}/api/models/ns/tagger/paths-info/main"
    assert httpx.post(url, json={"paths": asked}).status_code == 400
    assert httpx.post(url, data={"paths": "x" * (1 << 20)}).status_code == 413


def test_the_file_system(hub):
    """`hf://` paths, as fsspec's users write them."""
    files = huggingface_hub.HfFileSystem(endpoint=hub.endpoint, token=False)
    assert files.glob("ns/tagger@v1/**/*.txt") == ["ns/tagger@v1/notes/resolve/seen.txt"]
    assert files.info("ns/tagger@v1/notes")["type"] == "directory"
    assert not files.exists("ns/tagger@v2/notes")
    with files.open("ns/tagger@production/README.md") as stream:
        stream.seek(-20, os.SEEK_END)
        assert stream.read() == CARD[-20:]


@pytest.mark.parametrize(
    ("repo", "revision", "kind"),
    [
        ("ns/none", "main", RepositoryNotFoundError),
        ("ns/none", "production", RepositoryNotFoundError),
        ("ns/none", "Not A Revision", RepositoryNotFoundError),
        ("NS/Tagger", "main", RepositoryNotFoundError),
        ("ns/tagger", "staging", RevisionNotFoundError),
        ("ns/tagger", "3", RevisionNotFoundError),
        ("ns/tagger", "v3", RevisionNotFoundError),
        ("ns/tagger", "Not A Revision", RevisionNotFoundError),
        ("ns/tagger", "refs/pr/1", RevisionNotFoundError),
        ("ns/tagger", "0" * 40, RevisionNotFoundError),
    ],
)
def test_typed_errors(hub, cache, repo, revision, kind):
    places = {"endpoint": hub.endpoint, "cache_dir": cache, "revision": revision}
    with pytest.raises(kind, match=r"no (adapter|version|alias|digest) '"):
        hub.model_info(repo, revision=revision)
    with pytest.raises(kind):
        list(hub.list_repo_tree(repo, revision=revision))
    with pytest.raises(kind):
        hf_hub_download(repo, "adapter_config.json", **places)
    with pytest.raises(kind):
        snapshot_download(repo, **places)


def test_a_file_that_is_not_there(hub, local, cache):
    assert hub.file_exists("ns/tagger", "adapter_model.safetensors", revision="production")
    assert not hub.file_exists("ns/tagger", "adapter_model.bin")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ns/tagger", "adapter_model.bin", endpoint=hub.endpoint, cache_dir=cache)
    absent = cache / "models--ns--tagger" / ".no_exist" / commit(local, 1) / "adapter_model.bin"
    assert absent.is_file()  # the client remembers it, by the commit that the error named
    for path in ("..%2F..%2Fcatalog.sqlite3", "notes", "%2Fetc%2Fpasswd"):
        answer = httpx.get(f"{hub.endpoint}/ns/tagger/resolve/main/{path}")
        assert (answer.status_code, answer.headers["x-error-code"]) == (404, "EntryNotFound")


# --- bytes ---


def test_a_snapshot_is_the_version(hub, local, cache, tmp_path):
    local.pull("ns/tagger:1", tmp_path / "pulled")
    folder = Path(snapshot_download("ns/tagger", revision="production", endpoint=hub.endpoint, cache_dir=cache))
    assert content(folder) == content(tmp_path / "pulled")
    assert folder.name == commit(local, 1)
    again = snapshot_download("ns/tagger", revision="production", cache_dir=cache, local_files_only=True)
    assert Path(again) == folder


@pytest.mark.parametrize("revision", ["production", "v1"])
def test_one_file_of_a_version(hub, cache, revision):
    for path, text in (
        ("notes/resolve/seen.txt", "a folder called as a route"),
        ("notes/50% é #1?.md", "a name that needs quoting"),
    ):
        places = {"revision": revision, "endpoint": hub.endpoint, "cache_dir": cache}
        file = Path(hf_hub_download("ns/tagger", path, **places))
        assert file.read_text() == text
        assert file.resolve().name == hashlib.sha256(text.encode()).hexdigest()  # the ETag is the sha256


def test_an_alias_that_moves_tears_no_snapshot(local, cache, tmp_path):
    """The alias moves when the first file is asked for: what comes is version 1 whole, by the commit resolved first."""
    app, moved = create_app(local), []

    async def moving(scope, receive, send):
        if "/resolve/" in scope.get("path", "") and not moved:
            moved.append(local.promote("ns/tagger:2", "production"))
        await app(scope, receive, send)

    local.pull("ns/tagger:1", tmp_path / "1")
    local.pull("ns/tagger:2", tmp_path / "2")
    with serving(moving) as url:
        options = {"revision": "production", "endpoint": url, "cache_dir": cache}
        assert content(Path(snapshot_download("ns/tagger", **options))) == content(tmp_path / "1")
        assert moved
        assert content(Path(snapshot_download("ns/tagger", **options))) == content(tmp_path / "2")


def test_an_alias_that_moves_between_head_and_get(local, cache, tmp_path):
    """The client takes the commit from HEAD and then GETs: both versions' weights have the same size, so it would keep
    version 2's as version 1's."""
    app, methods = create_app(local), []

    async def moving(scope, receive, send):
        if "/resolve/" in scope.get("path", ""):
            methods.append(scope["method"])
            if methods.count("GET") == 1:
                local.promote("ns/tagger:2", "production")
        await app(scope, receive, send)

    local.pull("ns/tagger:1", tmp_path / "1")
    with serving(moving) as url:
        options = {"revision": "production", "endpoint": url, "cache_dir": cache}
        file = Path(hf_hub_download("ns/tagger", "adapter_model.safetensors", **options))
    assert local.resolve("ns/tagger@production").number == 2
    assert file.parent.name == commit(local, 1)
    assert file.read_bytes() == (tmp_path / "1" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=2-5", 2, 6),
        ("bytes=7-", 7, len(CARD)),
        ("bytes=-3", len(CARD) - 3, len(CARD)),
        ("bytes=0-", 0, len(CARD)),
        (f"bytes={(1 << 20) - 2}-{(1 << 20) + 2}", (1 << 20) - 2, (1 << 20) + 3),
        (f"bytes=1-{10 * len(CARD)}", 1, len(CARD)),
    ],
)
def test_ranges(hub, web, asked, start, stop):
    url = f"{hub.endpoint}/ns/tagger/resolve/main/README.md"
    answer = web.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, CARD[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(CARD)}"
    changed = web.get(url, headers={"Range": asked, "If-Range": '"another"'})
    assert (changed.status_code, changed.content) == (200, CARD)


def test_heads_and_ranges_that_are_none(hub, web, local):
    url = f"{hub.endpoint}/ns/tagger/resolve/production/README.md"
    head = web.head(url)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(CARD)))
    assert head.headers["etag"] == f'"{hashlib.sha256(CARD).hexdigest()}"'
    assert head.headers["x-repo-commit"] == commit(local, 1)
    beyond = web.get(url, headers={"Range": f"bytes={len(CARD)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(CARD)}")
    for none in ("bytes=-", "bytes=1-2,4-5", "lines=1-2", "bytes=" + "9" * 5000 + "-"):
        assert web.get(url, headers={"Range": none}).status_code == 200


def test_altered_bytes_never_arrive_as_a_file(hub, web, local, store, cache):
    """Stock clients compare sizes alone, so the server proves: a small file at once, a large one by its last bytes."""
    for entry in local.manifest(local.resolve("ns/tagger").digest).files:
        blob = store.place.path(entry.sha256)
        blob.chmod(0o644)
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(HfHubHTTPError, match="not what its digest says"):
        hf_hub_download("ns/tagger", "adapter_model.safetensors", endpoint=hub.endpoint, cache_dir=cache)
    assert list((cache / "models--ns--tagger").glob("snapshots/*/*")) == []
    card = f"{hub.endpoint}/ns/tagger/resolve/main/README.md"
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        web.get(card)
    answer = web.get(card, headers={"Range": "bytes=-1"})
    assert (answer.status_code, "not what its digest says" in answer.json()["error"]) == (422, True)
    store.place.path(entry.sha256).unlink()
    assert "is missing" in web.get(f"{hub.endpoint}/ns/tagger/resolve/main/{entry.path}").json()["error"]


# --- tokens ---


def test_tokens(local, cache):
    with served(local, {"s3cret": "ada"}) as url:
        outside, ada = HfApi(endpoint=url, token=False), HfApi(endpoint=url, token="s3cret")
        with pytest.raises(RepositoryNotFoundError, match="a bearer token that this registry knows is needed"):
            outside.model_info("ns/tagger")
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("ns/tagger", endpoint=url, cache_dir=cache, token="wrong")
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("ns/tagger", "README.md", endpoint=url, cache_dir=cache, token=False)
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            outside.whoami(token="wrong")
        assert ada.whoami()["name"] == "ada"
        assert ada.model_info("ns/tagger").private
        assert Path(snapshot_download("ns/tagger", endpoint=url, cache_dir=cache, token="s3cret")).is_dir()


# --- commands, as a user runs them ---


@contextmanager
def serving_command(folder):
    """`registry serve` in a process of its own; yields the environment in which stock clients use it."""
    own = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from loraplex_registry.cli import main; main()"
    command = [sys.executable, "-c", code, "--registry", str(folder), "serve", "--port", "0"]
    server = subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = server.stderr.readline().split()[-1]
        yield own | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder.parent / "hf"), "NO_COLOR": "1"}
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
        server.stderr.close()


def test_the_hf_command(local, tmp_path):
    def hf(*arguments: str):
        command = [Path(sys.executable).with_name("hf"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    with serving_command(tmp_path / "registry") as environment:
        done = hf("download", "ns/tagger", "--revision", "production")
        assert done.returncode == 0, done.stderr
        snapshot = tmp_path / "hf" / "hub" / "models--ns--tagger" / "snapshots" / commit(local, 1)
        local.pull("ns/tagger:1", tmp_path / "pulled")
        assert content(snapshot) == content(tmp_path / "pulled")
        proven = hf("cache", "verify", "ns/tagger", "--revision", "production")
        assert proven.returncode == 0, proven.stderr
        weights = (snapshot / "adapter_model.safetensors").resolve()
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        altered = hf("cache", "verify", "ns/tagger", "--revision", "production")
        assert altered.returncode == 1
        assert "adapter_model.safetensors" in altered.stdout + altered.stderr
        unknown = hf("download", "ns/none")
        assert unknown.returncode == 1
        assert "ns/none" in unknown.stderr


def test_another_registry_pushes_from_this_one(local, base, tmp_path):
    """`registry push NAME hf://…`: our own client of the Hub, on our own server of its protocol."""
    with serving_command(tmp_path / "registry") as environment:
        code = "from loraplex_registry.cli import main; main()"
        push = ["push", "copy", "hf://ns/tagger@production", "--base", str(base)]
        command = [sys.executable, "-c", code, "--registry", str(tmp_path / "other"), *push]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    with Registry(tmp_path / "other") as other:
        version = other.resolve("copy:1")
        assert version.message == f"from hf://ns/tagger@{commit(local, 1)}"
        copied = {entry.path: (entry.bytes, entry.sha256) for entry in other.manifest(version.digest).files}
    assert copied == kept(local)


_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

def answer(adapter, **options):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), adapter, **options)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits

first, second = answer(sys.argv[2]), answer(sys.argv[3])
assert not torch.allclose(first, second)
assert torch.equal(answer("ns/quotes-tagger", revision="production"), first)
assert torch.equal(answer("ns/quotes-tagger", revision="2"), second)
"""


def test_peft_loads_an_alias(tmp_path):
    base = make_torch_base(tmp_path / "base")
    folders = [make_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2)]
    with Registry(tmp_path / "registry") as registry:
        for folder in folders:
            registry.push("ns/quotes-tagger", folder, base=base)
        registry.promote("ns/quotes-tagger:1", "production")
    with serving_command(tmp_path / "registry") as environment:
        command = [sys.executable, "-c", _PEFT, str(base), *map(str, folders)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
