"""Stock Hub clients upload to this registry: huggingface_hub, the `hf` command, and peft, over real HTTP."""

import base64
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from serving import serving
from tiny import make_adapter
from tiny import make_base as make_torch_base

from loraplex_registry.cli import cli
from loraplex_registry.commit_stream import CommitReader
from loraplex_registry.errors import InvalidRequest, NoDraft, UnknownAdapter
from loraplex_registry.http import create_app
from loraplex_registry.hub_upload import _commit, _create, tag_revision
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry
from loraplex_registry.trusted_bases import TrustedBases

from .conftest import Adapter, make_receipt, run_python

NAME = "ns/tagger"


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The client of this process may use the network, that is 127.0.0.1, and forgets its connections afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def local(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def url(local, base):
    with serving(create_app(local, bases=TrustedBases.describe([f"tiny/base={base}"]))) as url:
        yield url


@pytest.fixture
def hub(url):
    return HfApi(endpoint=url, token=False)


@pytest.fixture
def folder(tmp_path, base):
    """An adapter with a receipt, a card and a note."""
    folder = Adapter().write(tmp_path / "adapter", make_receipt(base))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "seen é.txt").write_text("a note")
    (folder / ".DS_Store").write_text("what a desk leaves")
    return folder


def content(folder) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {path: file.read_bytes() for path, file in found.items() if not path.startswith(".")}


def draft(registry, name: str = NAME) -> dict[str, int]:
    """What is uploaded and not published: path → bytes."""
    found = registry.drafts.find(name)
    return {entry.path: entry.bytes for entry in found.files} if found else {}


def versions(registry, name: str = NAME) -> list[int]:
    try:
        return [version.number for version in registry.versions(name)]
    except UnknownAdapter:
        return []


def blobs(registry) -> set[str]:
    return {path.name for path in registry.store.place.blobs.glob("??/*")}


def hub_file(hub, path: str, revision: str):
    return hub.get_hf_file_metadata(
        url=huggingface_hub.hf_hub_url(NAME, path, revision=revision, endpoint=hub.endpoint)
    )


# --- from an upload to a version ---


def test_an_uploaded_folder_becomes_a_version_when_it_is_tagged(hub, local, folder, tmp_path):
    made = hub.create_repo(NAME)
    assert (made.repo_id, made.url) == (NAME, f"{hub.endpoint}/{NAME}")
    done = hub.upload_folder(repo_id=NAME, folder_path=folder, commit_message="the first")
    assert done.oid == local.drafts.find(NAME).commit
    assert draft(local).keys() == content(folder).keys()  # no hidden file
    assert versions(local) == []
    hub.create_tag(NAME, tag="production", tag_message="reviewed")
    version = local.resolve(f"{NAME}@production")
    assert (version.number, version.message, version.created_by) == (1, "reviewed", "http")
    assert local.history(NAME, "production")[0].reason == "reviewed"
    assert local.drafts.find(NAME) is None
    assert local.verify() == []
    pushed = local.push("pushed", folder, base=tmp_path / "base")
    assert pushed.digest == version.digest  # by whatever way it comes, it is the same version
    read = snapshot_download(NAME, revision="production", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert content(read) == content(folder)
    refs = hub.list_repo_refs(NAME)
    assert {one.name for one in refs.branches} == {"main", "production"}
    assert {one.name for one in refs.tags} == {"v1"}


def test_nobody_reads_half_an_upload(hub, local, folder, base, tmp_path):
    """Files come one by one over a version that is there: main stays that version until a tag."""
    local.push(NAME, Adapter(seed=1).write(tmp_path / "old"), base=base)
    before = hub.model_info(NAME).sha
    for path in ("adapter_model.safetensors", "receipt.json", "adapter_config.json"):
        hub.upload_file(path_or_fileobj=folder / path, path_in_repo=path, repo_id=NAME)
        assert hub.model_info(NAME).sha == hub.model_info(NAME, revision="main").sha == before
        assert {one.rfilename for one in hub.model_info(NAME).siblings} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    hub.create_tag(NAME, tag="v2")
    assert versions(local) == [1, 2]
    assert hub.model_info(NAME).sha == hub.model_info(NAME, revision="v2").sha != before
    files = {entry.path for entry in local.manifest(local.resolve(f"{NAME}:2").digest).files}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "receipt.json"}
    assert local.resolve(f"{NAME}:2").message == "\n".join(
        f"Upload {path} with huggingface_hub" for path in ("adapter_model.safetensors", "receipt.json")
    )  # the configuration was the same already


def test_a_name_with_uploads_alone(hub, local, folder, tmp_path):
    """It is there for who creates and uploads, and has no revision for who reads."""
    assert not hub.repo_exists(NAME)
    with pytest.raises(RepositoryNotFoundError):
        hub.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=NAME)
    hub.create_repo(NAME)
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        hub.create_repo(NAME)
    assert hub.create_repo(NAME, exist_ok=True).repo_id == NAME
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    assert hub.repo_exists(NAME)
    assert hub.model_info(NAME).siblings == []
    refs = hub.list_repo_refs(NAME, include_pull_requests=True)
    assert (refs.branches, refs.tags) == ([], [])
    assert hub.model_info(NAME, revision="main").sha == hub.model_info(NAME).sha == local.drafts.find(NAME).commit
    for revision in ("main", "production", "v1", hub.model_info(NAME).sha):
        if revision != "main":
            with pytest.raises(RevisionNotFoundError, match="has no version yet"):
                hub.model_info(NAME, revision=revision)
        with pytest.raises(RevisionNotFoundError):
            snapshot_download(NAME, revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    with pytest.raises(EntryNotFoundError):  # though it was uploaded
        hub_file(hub, "README.md", "main")
    with pytest.raises(RevisionNotFoundError):
        hub_file(hub, "README.md", "production")
    kept = {"README.md", "adapter_model.safetensors"}
    delete = sorted(content(folder).keys() - kept)
    hub.upload_folder(repo_id=NAME, folder_path=folder, allow_patterns=["README.md"], delete_patterns=delete)
    assert draft(local).keys() == kept


def test_commits_change_files_one_by_one(hub, local, folder, base, tmp_path):
    local.push(NAME, folder, base=base)
    first = hub.upload_file(path_or_fileobj=b"# new", path_in_repo="README.md", repo_id=NAME).oid
    assert draft(local) == {path: len(data) for path, data in content(folder).items()} | {"README.md": 5}
    assert hub.upload_file(path_or_fileobj=b"# new", path_in_repo="README.md", repo_id=NAME).oid == first
    hub.delete_file("receipt.json", NAME)
    hub.delete_folder("notes", NAME)
    with pytest.raises(EntryNotFoundError, match="none"):
        hub.delete_file("none.txt", NAME)
    with pytest.raises(EntryNotFoundError):
        hub.delete_folder("none", NAME)
    operations = [
        CommitOperationCopy("adapter_model.safetensors", "copy/weights.safetensors"),
        CommitOperationAdd("copy/empty.txt", b""),
        CommitOperationDelete("README.md"),
    ]
    last = hub.create_commit(NAME, operations, commit_message="three at once", commit_description="and why")
    assert last.oid == local.drafts.find(NAME).commit != first
    weights = (folder / "adapter_model.safetensors").stat().st_size
    config = (folder / "adapter_config.json").stat().st_size
    assert draft(local) == {
        "adapter_config.json": config,
        "adapter_model.safetensors": weights,
        "copy/weights.safetensors": weights,
        "copy/empty.txt": 0,
    }
    assert local.drafts.find(NAME).messages[-1] == "three at once\nand why"
    hub.create_tag(NAME, tag="v2", revision=last.oid)
    assert versions(local) == [1, 2]
    read = Path(snapshot_download(NAME, revision="v2", endpoint=hub.endpoint, cache_dir=tmp_path / "cache"))
    assert {path: len(data) for path, data in content(read).items()}["copy/weights.safetensors"] == weights
    copy = CommitOperationCopy("notes/seen é.txt", "again.txt", src_revision="v1")
    with pytest.raises(HfHubHTTPError, match="send it inside the commit"):
        hub.create_commit(NAME, [copy], commit_message="of another version")


def test_a_commit_on_another_parent_is_refused(hub, local, folder, base):
    local.push(NAME, folder, base=base)
    head = hub.model_info(NAME).sha
    ours = hub.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, parent_commit=head).oid
    with pytest.raises(HfHubHTTPError, match=f"at commit {ours}, not at the parent {head}") as caught:
        hub.upload_file(path_or_fileobj=b"2", path_in_repo="b", repo_id=NAME, parent_commit=head)
    assert caught.value.response.status_code == 412
    assert "b" not in draft(local)
    assert hub.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, parent_commit=head).oid == ours
    hub.upload_file(path_or_fileobj=b"2", path_in_repo="b", repo_id=NAME, parent_commit=ours)
    assert {"a", "b"} <= draft(local).keys()


def test_an_upload_of_several_commits(hub, local, folder, monkeypatch):
    """Stock clients split an upload after 100 MiB; here, after a few bytes. The tag sees all of it."""
    monkeypatch.setattr("huggingface_hub._upload_pipeline.REGULAR_CONTENT_BYTES_BUDGET", 10)
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder, commit_message="in parts")
    assert "in parts (part 4)" in local.drafts.find(NAME).messages
    hub.create_tag(NAME, tag="v1")
    assert {entry.path for entry in local.manifest(local.resolve(NAME).digest).files} == content(folder).keys()


def test_deleting_again_what_main_still_shows(hub, local, folder, base):
    """Clients list what to delete by main, which shows a file until a tag, though the draft has lost it."""
    local.push(NAME, folder, base=base)
    for _ in range(2):
        hub.upload_folder(
            repo_id=NAME, folder_path=folder, allow_patterns=["*.md"], delete_patterns=["notes/*", "rec*"]
        )
        assert draft(local).keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    hub.delete_folder("notes", NAME)
    hub.delete_file("receipt.json", NAME)


def test_two_clients_commit_at_once(url, local):
    HfApi(endpoint=url, token=False).create_repo(NAME)

    def upload(number: int) -> None:
        with httpx.Client() as web:
            answer = post_commit(web, url, [added(f"notes/{number}.txt", b"%d" % number), added("shared.txt", b"same")])
            assert answer.status_code == 200, answer.text

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(16)))
    assert draft(local).keys() == {"shared.txt", *(f"notes/{number}.txt" for number in range(16))}


# --- what is there already ---


class Counted:
    """An application, and the bytes that the bodies of commits to it had."""

    def __init__(self, app) -> None:
        self.app, self.commit_bytes = app, 0

    async def __call__(self, scope, receive, send) -> None:
        async def counted():
            message = await receive()
            self.commit_bytes += len(message.get("body", b""))
            return message

        commits = scope["type"] == "http" and "/commit/" in scope["path"]
        await self.app(scope, counted if commits else receive, send)


@pytest.fixture
def counted(local, base):
    app = Counted(create_app(local, bases=TrustedBases.describe([f"tiny/base={base}"])))
    with serving(app) as url:
        app.hub = HfApi(endpoint=url, token=False)
        yield app


def sent(app, act) -> int:
    """The bytes of commits that an act sends."""
    before = app.commit_bytes
    act()
    return app.commit_bytes - before


def test_a_repeated_upload_sends_no_bytes(counted, local, folder):
    hub = counted.hub
    hub.create_repo(NAME)
    whole = folder / "adapter_model.safetensors"
    assert sent(counted, lambda: hub.upload_folder(repo_id=NAME, folder_path=folder)) > whole.stat().st_size
    head = local.drafts.find(NAME)
    for act in (
        lambda: hub.upload_folder(repo_id=NAME, folder_path=folder),
        lambda: hub.upload_file(path_or_fileobj=whole, path_in_repo=whole.name, repo_id=NAME),
        lambda: hub.create_commit(NAME, [CommitOperationAdd(whole.name, whole)], commit_message="again"),
    ):
        done = []
        assert sent(counted, lambda act=act, done=done: done.append(act())) == 0
        assert done[0].oid == head.commit
    assert local.drafts.find(NAME) == head
    hub.create_tag(NAME, tag="v1")
    assert sent(counted, lambda: hub.upload_folder(repo_id=NAME, folder_path=folder)) == 0
    assert (local.drafts.find(NAME), versions(local)) == (None, [1])


def test_an_upload_that_ended_early_sends_the_rest(counted, local, folder):
    hub = counted.hub
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder, ignore_patterns=["*.md", "notes/*"])
    weights = (folder / "adapter_model.safetensors").stat().st_size
    assert 0 < sent(counted, lambda: hub.upload_folder(repo_id=NAME, folder_path=folder)) < weights
    assert draft(local) == {path: len(data) for path, data in content(folder).items()}
    changed = change_one_byte(folder / "adapter_model.safetensors")  # as large as before
    assert weights < sent(counted, lambda: hub.upload_folder(repo_id=NAME, folder_path=folder)) < 2 * weights
    (entry,) = [one for one in local.drafts.find(NAME).files if one.path == "adapter_model.safetensors"]
    assert entry.sha256 == hashlib.sha256(changed).hexdigest()


def change_one_byte(file: Path) -> bytes:
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return file.read_bytes()


def test_an_upload_again_over_a_version_names_the_drafts_commit(counted, local, folder, base):
    """Else whoever tags the commit that an upload gave would tag the version of before, when all was there already."""
    hub = counted.hub
    local.push(NAME, folder, base=base)
    change_one_byte(folder / "adapter_model.safetensors")
    first = hub.upload_folder(repo_id=NAME, folder_path=folder).oid
    again = []
    smallest = sent(counted, lambda: again.append(hub.upload_folder(repo_id=NAME, folder_path=folder).oid))
    assert again == [first] == [local.drafts.find(NAME).commit]
    assert 0 < smallest < 500
    hub.create_tag(NAME, tag="production", revision=first)
    assert local.resolve(f"{NAME}@production").number == 2


def test_a_damaged_file_is_sent_again(counted, local, folder):
    hub = counted.hub
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    entry = next(one for one in local.drafts.find(NAME).files if one.path == "adapter_model.safetensors")
    change_one_byte(local.store.place.path(entry.sha256))
    assert sent(counted, lambda: hub.upload_folder(repo_id=NAME, folder_path=folder)) > entry.bytes
    hub.create_tag(NAME, tag="v1")
    assert local.verify() == []


def test_what_other_names_have_is_not_told(counted, local, folder, base):
    """The same bytes at the same path: of a name of one's own, of somebody else's, and by a token for one's own."""
    local.push("other/tagger", folder, base=base)
    secret = local.tokens.create("team", ["push"], "ns/").secret
    file = folder / "adapter_model.safetensors"
    asked = {"files": [{"path": file.name, "size": file.stat().st_size, "sample": ""}]}
    with httpx.Client(base_url=counted.hub.endpoint, headers={"Authorization": f"Bearer {secret}"}) as web:
        web.post("/api/repos/create", json={"organization": "ns", "name": "tagger"})
        (own,) = web.post("/api/models/ns/tagger/preupload/main", json=asked).json()["files"]
        assert own == {"path": file.name, "uploadMode": "regular", "shouldIgnore": False}
        assert web.post("/api/models/other/tagger/preupload/main", json=asked).status_code == 404


# --- tags ---


def test_what_does_not_validate_makes_no_version(hub, local, folder, base):
    hub.create_repo(NAME)
    with pytest.raises(HfHubHTTPError, match=r"adapter_config\.json is missing; adapter_model\.safetensors is missing"):
        hub.create_tag(NAME, tag="production")
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    (folder / "adapter_config.json").write_text(json.dumps(Adapter(config={"use_dora": True, "bias": "all"}).config))
    hub.upload_file(path_or_fileobj=folder / "adapter_config.json", path_in_repo="adapter_config.json", repo_id=NAME)
    for word in ("production", "v1"):
        with pytest.raises(HfHubHTTPError, match=r"bias is 'all'.*DoRA") as caught:
            hub.create_tag(NAME, tag=word, exist_ok=True)
        assert caught.value.response.status_code == 422
    hub.upload_file(path_or_fileobj=b"\x80\x04.", path_in_repo="training_args.bin", repo_id=NAME)
    with pytest.raises(HfHubHTTPError, match=r"training_args.bin is a pickle"):
        hub.create_tag(NAME, tag="production")
    assert (versions(local), local.aliases()) == ([], {})
    assert not list(local.store.staging.iterdir())


@pytest.mark.parametrize(("word", "status"), [("v1", 409), ("1", 409), ("v3", 400), ("v7", 400)])
def test_a_tag_that_names_another_number(hub, local, folder, base, tmp_path, word, status):
    local.push(NAME, Adapter(seed=1).write(tmp_path / "old"), base=base)
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    with pytest.raises(HfHubHTTPError, match=f"these files are {NAME}:2, or would be, not {NAME}:{word[-1]}") as caught:
        hub.create_tag(NAME, tag=word)
    assert caught.value.response.status_code == status
    assert versions(local) == [1]
    assert draft(local)
    hub.create_tag(NAME, tag="2")
    assert versions(local) == [1, 2]


def test_tags_of_what_is_published(hub, local, base, tmp_path):
    """Without a draft a tag makes nothing; an alias moves, and its ledger says so."""
    for seed in (1, 2):
        local.push(NAME, Adapter(seed=seed).write(tmp_path / str(seed)), base=base)
    hub.create_tag(NAME, tag="production", revision="v1")
    hub.create_tag(NAME, tag="production", revision=hub.model_info(NAME, revision="2").sha)
    assert [move.to_number for move in local.history(NAME, "production")] == [1, 2]
    hub.create_tag(NAME, tag="v2")
    with pytest.raises(HfHubHTTPError, match=f"'main' is {NAME}:2, not {NAME}:1"):
        hub.create_tag(NAME, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        hub.create_tag(NAME, tag="x", revision="staging")
    with pytest.raises(RepositoryNotFoundError):
        hub.create_tag("ns/none", tag="x")
    for word in ("main", "a" * 40, "No Such", "", "a/b"):
        with pytest.raises(BadRequestError):
            hub.create_tag(NAME, tag=word)
    assert versions(local) == [1, 2]
    assert local.aliases() == {NAME: {"production": 2}}


def test_a_tag_that_a_rule_forbids(hub, local, folder, base):
    """exist_ok passes over 409: then the client would believe that the alias moved."""
    local.push(NAME, folder, base=base)
    local.protections.protect(NAME, "production", ["tag_f1>=0.9"])
    hub.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=NAME)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match=f"{NAME}@production does not move to {NAME}:2") as caught:
            hub.create_tag(NAME, tag="production", exist_ok=True)
        assert caught.value.response.status_code == 422
        assert (versions(local), local.aliases()) == ([1, 2], {})
    local.protections.unprotect(NAME, "production")
    hub.create_tag(NAME, tag="production", exist_ok=True)
    assert (versions(local), local.aliases()) == ([1, 2], {NAME: {"production": 2}})


def test_a_damaged_draft(hub, local, folder):
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    (kept,) = [entry.sha256 for entry in local.drafts.find(NAME).files if entry.path == "README.md"]
    local.store.place.path(kept).write_bytes(b"altered")
    with pytest.raises(HfHubHTTPError, match=f"upload first: sha256:{kept}") as caught:
        hub.create_tag(NAME, tag="v1", exist_ok=True)
    assert (caught.value.response.status_code, versions(local)) == (422, [])


def test_a_tag_after_a_lost_answer(hub, local, folder, monkeypatch):
    """The process dies between the version's row and the end of the draft: the tag, again, ends what it began."""
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    with monkeypatch.context() as patched:
        patched.setattr(local, "promote", lambda *_, **__: 1 / 0)
        with pytest.raises(HfHubHTTPError):
            hub.create_tag(NAME, tag="production")
    assert (versions(local), local.aliases()) == ([1], {})
    hub.create_tag(NAME, tag="production")
    assert (versions(local), local.aliases()) == ([1], {NAME: {"production": 1}})
    assert local.drafts.find(NAME) is None


def test_a_commit_while_a_tag_is_made_is_kept(hub, local, folder, monkeypatch):
    """It comes after the files were taken for the version: it is no part of it, and waits for the next."""
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    promote = local.promote

    def late(*arguments, **options):
        hub.upload_file(path_or_fileobj=b"late", path_in_repo="late.txt", repo_id=NAME)
        return promote(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(local, "promote", late)
        hub.create_tag(NAME, tag="production")
    assert versions(local) == [1]
    assert draft(local).keys() == {"late.txt", *content(folder)}
    hub.create_tag(NAME, tag="v2")
    first, second = (local.manifest(version.digest).files for version in local.versions(NAME))
    assert {entry.path for entry in second} - {entry.path for entry in first} == {"late.txt"}


# --- bases ---


def upload(hub, name: str, adapter: Adapter, folder: Path, receipt: dict | None = None) -> None:
    hub.create_repo(name, exist_ok=True)
    hub.upload_folder(repo_id=name, folder_path=adapter.write(folder, receipt))


@pytest.mark.parametrize("trusted", ["tiny/base={base}", "{base}"])
def test_the_base_is_one_that_the_operator_named(local, base, tmp_path, trusted):
    bases = TrustedBases.describe([trusted.format(base=base)])
    with serving(create_app(local, bases=bases)) as url:
        hub = HfApi(endpoint=url, token=False)
        local.push(
            "known", Adapter(config={"base_model_name_or_path": "org/seen"}).write(tmp_path / "known"), base=base
        )
        named = ["org/seen"]  # what a version calls the same weights
        named += ["tiny/base"] if "=" in trusted else [str(base), "base", "/home/somebody/models/base"]
        for number, word in enumerate(named, 1):
            adapter = Adapter(seed=number, config={"base_model_name_or_path": word})
            upload(hub, NAME, adapter, tmp_path / f"adapter-{number}")
            hub.create_tag(NAME, tag=f"v{number}")
            found = local.resolve(f"{NAME}:{number}").base
            assert (found.id, found.fingerprint) == (word, local.resolve("known").base.fingerprint)
        upload(hub, "ns/other", Adapter(config={"base_model_name_or_path": "org/other"}), tmp_path / "other")
        with pytest.raises(HfHubHTTPError, match=r"'org/other' is neither .*\(trusted are (tiny/)?base\)") as caught:
            hub.create_tag("ns/other", tag="v1")
        assert str(base) not in str(caught.value)  # where bases lie on the server
        upload(hub, "ns/receipt", Adapter(), tmp_path / "receipt", make_receipt(base))
        hub.create_tag("ns/receipt", tag="v1")  # a receipt's fingerprint says more than a name


def test_a_path_that_the_upload_names_is_never_read(hub, local, base, tmp_path, monkeypatch):
    """The base lies at that very path, and under that very name below the server's folder: neither is looked at."""
    other = make_base_at(tmp_path / "somewhere" / "else")
    monkeypatch.chdir(tmp_path)
    words = [str(other), "somewhere/else", "./somewhere/else", "../../etc", "somewhere/../somewhere"]
    for number, word in enumerate(words):
        receipt = {"format": "loraplex.receipt/1", "base": {"id": word, "path": str(other)}}
        upload(
            hub, f"ns/a{number}", Adapter(config={"base_model_name_or_path": word}), tmp_path / f"a{number}", receipt
        )
        with pytest.raises(HfHubHTTPError, match=r"neither among those that the registry trusts .*--base") as caught:
            hub.create_tag(f"ns/a{number}", tag="v1")
        assert caught.value.response.status_code == 422
    upload(hub, "ns/none", Adapter(config={"base_model_name_or_path": None}), tmp_path / "none")
    with pytest.raises(HfHubHTTPError, match="do not say which base they belong to"):
        hub.create_tag("ns/none", tag="v1")
    upload(hub, "ns/cut", Adapter(config={"revision": "../../../secret"}), tmp_path / "cut")
    hub.create_tag("ns/cut", tag="v1")  # tiny/base is trusted; a revision opens nothing


def make_base_at(folder: Path) -> Path:
    from .conftest import make_base

    return make_base(folder, seed=3)


def test_a_base_in_the_servers_hub_cache(local, base, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--tiny--base"
    commit = "c" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    base.rename(cache / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(create_app(local)) as url:
        hub = HfApi(endpoint=url, token=False)
        upload(hub, NAME, Adapter(), tmp_path / "adapter")
        hub.create_tag(NAME, tag="v1")
        assert local.resolve(f"{NAME}:1").base.fingerprint
        (cache / "snapshots" / commit / "model.safetensors").unlink()
        upload(hub, NAME, Adapter(seed=1), tmp_path / "adapter")
        with pytest.raises(HfHubHTTPError, match=r"tiny/base.*\(none is named\) nor whole in its Hub cache"):
            hub.create_tag(NAME, tag="v2")


def test_two_bases_of_one_name(base, tmp_path):
    from loraplex_registry.errors import BaseNotFound, InvalidRequest

    other = make_base_at(tmp_path / "other" / "base")
    with pytest.raises(InvalidRequest, match="two bases are called 'base'"):
        TrustedBases.describe([str(base), str(other)])
    assert {word for word, _ in TrustedBases.describe([str(base), f"other={other}"]).named} >= {"base", "other"}
    with pytest.raises(BaseNotFound):
        TrustedBases.describe([str(tmp_path / "nothing")])


# --- publishing without a tag ---


@pytest.mark.parametrize("how", ["folder", "url"])
def test_publish(url, hub, local, folder, base, tmp_path, how):
    with local if how == "folder" else RemoteRegistry(url) as registry:
        with pytest.raises(NoDraft, match=f"no unpublished files of '{NAME}'"):
            registry.publish_draft(NAME)
        upload(hub, NAME, Adapter(), tmp_path / "a")
        version = registry.publish_draft(NAME, base=base, message="by hand")
        assert (version.number, version.pushed, version.message) == (1, True, "by hand")
        assert registry.versions(NAME) == [version]
        assert local.aliases() == {}
        hub.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=NAME)
        hub.delete_file("a.txt", NAME)
        again = registry.publish_draft(NAME, base=base)
        assert (again.number, again.pushed) == (1, False)
        with pytest.raises(NoDraft):
            registry.publish_draft(NAME, base=base)
        hub.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=NAME)
        registry.discard_draft(NAME)
        assert (draft(local), versions(local)) == ({}, [1])
        with pytest.raises(NoDraft):
            registry.discard_draft(NAME)


def test_the_publish_command(url, hub, local, base, tmp_path):
    for where, name in ((url, "by/url"), (str(local.root), "in/folder")):
        upload(hub, name, Adapter(), tmp_path / "adapter")
        options = [] if where == url else ["--base", str(base)]
        done = CliRunner().invoke(cli, ["--registry", where, "publish", name, *options, "-m", "by hand"])
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith(f"published {name}:1 (")
        assert local.resolve(f"{name}:1").message == "by hand"
        done = CliRunner().invoke(cli, ["--registry", where, "publish", name])
        assert (done.exit_code, done.stderr) == (1, f"error: no unpublished files of '{name}'\n")
        hub.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=name)
        done = CliRunner().invoke(cli, ["--registry", where, "discard", name])
        assert (done.exit_code, done.stdout) == (0, f"discarded the unpublished files of {name}\n")
        assert draft(local, name) == {}
    upload(hub, "ns/baseless", Adapter(), tmp_path / "adapter")
    done = CliRunner().invoke(cli, ["--registry", str(local.root), "publish", "ns/baseless"])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "the base 'tiny/base' is neither among" in done.stderr


# --- what waits ---


@pytest.mark.parametrize("how", ["folder", "url"])
def test_open_drafts_are_told(url, hub, local, folder, base, tmp_path, how):
    with local if how == "folder" else RemoteRegistry(url) as registry:
        assert registry.drafts.list() == []
        hub.create_repo("ns/empty")
        upload(hub, NAME, Adapter(), tmp_path / "a")
        (before,) = registry.drafts.list(NAME)
        hub.upload_file(path_or_fileobj=b"four", path_in_repo="a.txt", repo_id=NAME)
        (after,) = registry.drafts.list(NAME)
        assert (after.files, after.bytes, after.at > before.at) == (before.files + 1, before.bytes + 4, True)
        local.push("ns/published", folder, base=base)
        hub.upload_file(path_or_fileobj=b"# new", path_in_repo="README.md", repo_id="ns/published")
        empty, published, tagger = registry.drafts.list()
        assert [one.name for one in (empty, published, tagger)] == ["ns/empty", "ns/published", NAME]
        assert (empty.files, empty.bytes, empty.who) == (0, 0, "http")
        for one in (published, tagger):
            sizes = draft(local, one.name)
            assert (one.files, one.bytes) == (len(sizes), sum(sizes.values()))
        assert empty.at < tagger.at < published.at
        assert timedelta(0) <= datetime.now(UTC) - published.at < timedelta(minutes=1)
        assert registry.drafts.list(NAME) == [tagger]
        with pytest.raises(NoDraft, match="no unpublished files of 'ns/none'"):
            registry.drafts.list("ns/none")
        first = registry.drafts.page(limit=2)
        assert (first.data, registry.drafts.page(limit=2, cursor=first.next).data) == ([empty, published], [tagger])
        with pytest.raises(InvalidRequest):
            registry.drafts.page(NAME, cursor=first.next)
        registry.publish_draft(NAME, base=base)
        registry.discard_draft("ns/empty")
        assert registry.drafts.list() == [published]


def test_drafts_of_other_names_are_not_there_for_a_prefix(url, hub, local):
    for name in ("ns/one", "other/two"):
        hub.create_repo(name)
    with RemoteRegistry(url, local.tokens.create("team", ["read"], "ns/").secret) as registry:
        assert [one.name for one in registry.drafts.list()] == ["ns/one"]
        with pytest.raises(NoDraft):
            registry.drafts.list("other/two")


def test_the_drafts_command(url, hub, local, tmp_path):
    for where in (url, str(local.root)):
        answer = CliRunner().invoke(cli, ["--registry", where, "drafts"])
        assert (answer.exit_code, answer.stdout) == (0, f"no unpublished files in {where}\n")
    upload(hub, NAME, Adapter(), tmp_path / "a")
    for where in (url, str(local.root)):
        head, row = CliRunner().invoke(cli, ["--registry", where, "drafts"]).stdout.splitlines()
        assert head.split() == ["adapter", "files", "size", "last", "change", "by"]
        assert (row.split()[:2], row.split()[-1]) == ([NAME, "2"], "http")
        (told,) = json.loads(CliRunner().invoke(cli, ["--registry", where, "drafts", NAME, "--format", "json"]).stdout)
        assert (told["name"], told["files"], told["bytes"]) == (NAME, 2, sum(draft(local).values()))
        none = CliRunner().invoke(cli, ["--registry", where, "drafts", "ns/none"])
        assert (none.exit_code, none.stderr) == (1, "error: no unpublished files of 'ns/none'\n")


# --- what is refused ---


def added(path, data: bytes, **changes) -> dict:
    return {
        "key": "file",
        "value": {"content": base64.b64encode(data).decode(), "path": path, "encoding": "base64"} | changes,
    }


def post_commit(web, url, operations, header=None, name=NAME, **query):
    lines = [{"key": "header", "value": header or {"summary": "s", "description": ""}}, *operations]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return web.post(f"{url}/api/models/{name}/commit/main", content=body, params=query)


BAD_PATHS = [
    "../up", "a/../../up", "/etc/passwd", "a\\b", "a\0b", "a\nb", "", ".", "a//b", "a/", ".git/config", "a/.hidden",
    "x" * 1025, "x/" * 200 + "x", 7, None, ["a"],
]  # fmt: skip


def test_paths_that_are_refused(url, local, tmp_path):
    HfApi(endpoint=url, token=False).create_repo(NAME)
    before = sorted(path for path in tmp_path.rglob("*") if "sqlite3" not in path.name)
    with httpx.Client() as web:
        for path in BAD_PATHS:
            for operation in (
                added(path, b"data"),
                {"key": "deletedFile", "value": {"path": path}},
                {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": "0" * 64, "size": 1}},
            ):
                answer = post_commit(web, url, [added("fine.txt", b"fine"), operation])
                assert (answer.status_code, "path" in answer.json()["error"]) == (400, True), (path, answer.text)
    assert draft(local) == {}
    leftovers = sorted(path for path in tmp_path.rglob("*") if "sqlite3" not in path.name and path.name != "staging")
    assert leftovers == before


REFUSED = [
    ([], 400, "no line with key 'header'"),
    ([added("a", b"1")], 400, "line 1: key is 'file'; the first line alone is the header"),
    ([{"key": "header", "value": {"description": "d"}}], 400, "summary is None, expected a string"),
    ([{"key": "header", "value": {"summary": 1}}], 400, "summary is 1, expected a string"),
    ([{"key": "header", "value": {"summary": "s", "parentCommit": "zz"}}], 400, "parentCommit is 'zz', expected"),
    ([{"key": "header", "value": {"summary": "s" * 5000}}], 400, "5,000 characters, at most 4,096"),
    ([{"key": "header", "value": {"summary": "s" * 70_000}}], 413, "more than 65,536 bytes beside a file's content"),
    (["s", {"key": "files", "value": {}}], 400, "line 2: key is 'files', expected header, file, lfsFile"),
    (["s", {"key": "file"}], 400, "expected an object with 'key' and an object 'value'"),
    (["s", [1]], 400, "expected an object with 'key' and an object 'value'"),
    (["s", added("a", b"", content=None)], 400, "'content' is missing"),
    (["s", added("a", b"", content=7)], 400, "'content' is missing"),
    (["s", added("a", b"", content="QQ")], 400, "line 2: 'content' is not base64: Incorrect padding"),
    (["s", added("a", b"", content="QQ==QQ==")], 400, "'content' is not base64"),
    (["s", added("a", b"", content="Q\nQ=")], 400, "'content' is not base64"),
    (["s", added("a", b"", content="====")], 400, "'content' is not base64"),
    (["s", added("a", b"1", encoding="utf-8")], 400, "encoding is 'utf-8', expected 'base64'"),
    (["s", added("a", b"1"), added("a", b"2")], 400, "'a' is added twice"),
    (["s", added("a", b"1"), added("a/b", b"2")], 400, "'a' would be a file and a folder"),
    (["s", *(added(f"{n}", b"") for n in range(201))], 400, "201 files, at most 200 are taken"),
    (["s", *([{"key": "deletedFile", "value": {"path": "x"}}] * 900)], 413, "more than 800 lines"),
    (["s", {"key": "lfsFile", "value": {"path": "a", "algo": "md5", "oid": "0" * 64}}], 400, "oid is"),
    (["s", {"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": "0" * 64}}], 422, "has no file with"),
]  # "s" is a header as it should be


def test_commits_that_are_refused(url, local):
    HfApi(endpoint=url, token=False).create_repo(NAME)
    header = {"key": "header", "value": {"summary": "s"}}
    with httpx.Client() as web:
        for lines, status, told in REFUSED:
            body = b"".join(json.dumps(header if line == "s" else line).encode() + b"\n" for line in lines)
            answer = web.post(f"{url}/api/models/{NAME}/commit/main", content=body)
            assert (answer.status_code, draft(local)) == (status, {}), answer.text
            assert told in answer.json()["error"]
            assert answer.headers["x-error-message"]
    assert not list(local.store.staging.iterdir())


def test_content_wherever_it_stands_in_the_line(url, local):
    """Other clients order the fields otherwise, and words of the protocol may be in a path or a message."""
    HfApi(endpoint=url, token=False).create_repo(NAME)
    data = os.urandom(3_000_001)
    tricky = 'quote"content": "QQ==.txt'
    lines = [
        '{ "value" : {"summary":"\\"content\\":\\"QQ==\\"", "description": ""}, "key" : "header" }',
        json.dumps(
            {
                "value": {"path": "one.bin", "encoding": "base64", "content": base64.b64encode(data).decode()},
                "key": "file",
            }
        ),
        json.dumps(
            {"key": "file", "value": {"path": tricky, "content": "", "encoding": "base64"}}, separators=(",", ":")
        ),
        '{"key":"file","value":{"content" :\t"aGk=","path":"two.txt"}}',
    ]
    answer = httpx.post(f"{url}/api/models/{NAME}/commit/main", content="\r\n".join(lines).encode())
    assert answer.status_code == 200, answer.text
    assert draft(local) == {"one.bin": len(data), tricky: 0, "two.txt": 2}
    (kept,) = [entry.sha256 for entry in local.drafts.find(NAME).files if entry.path == "one.bin"]
    assert kept == hashlib.sha256(data).hexdigest()
    assert local.store.place.path(kept).read_bytes() == data
    twice = (
        '{"key":"header","value":{"summary":"s"}}\n{"key":"file","value":{"content":"","content":"QQ==","path":"x"}}'
    )
    answer = httpx.post(f"{url}/api/models/{NAME}/commit/main", content=twice.encode())
    assert (answer.status_code, "given twice" in answer.text) == (400, True)
    cut = '{"key":"header","value":{"summary":"s"}}\n{"key":"file","value":{"path":"x","content":"QQ=='
    answer = httpx.post(f"{url}/api/models/{NAME}/commit/main", content=cut.encode())
    assert (answer.status_code, "ends inside a file's content" in answer.text) == (400, True)


def test_more_bytes_than_the_registry_takes(local, tmp_path):
    from loraplex_registry.validate import Limits

    with Registry(tmp_path / "small", Limits(max_bytes=1_000_000)) as small, serving(create_app(small)) as url:
        hub = HfApi(endpoint=url, token=False)
        hub.create_repo(NAME)
        files = [CommitOperationAdd(f"{number}.bin", os.urandom(400_000)) for number in range(40)]
        with pytest.raises(HfHubHTTPError, match="the files of one commit have more than 1,000,000 bytes") as caught:
            hub.create_commit(NAME, files, commit_message="too much")
        assert caught.value.response.status_code == 413
        assert (draft(small), blobs(small)) == ({}, set())
        hub.create_commit(NAME, files[:2], commit_message="two fit")
        with pytest.raises(HfHubHTTPError, match="would have 1,200,000 bytes, at most 1,000,000") as caught:
            hub.create_commit(NAME, files[2:3], commit_message="a third does not")
        assert caught.value.response.status_code == 413
        assert len(draft(small)) == 2


def test_what_the_hub_does_and_this_registry_does_not(hub, local, folder, base):
    local.push(NAME, folder, base=base)
    local.push("plain", folder, base=base)
    hub.create_tag(NAME, tag="production")
    refused = {
        "branches are not offered": lambda: hub.create_branch(NAME, branch="dev"),
        "versions: each is deleted by itself": lambda: hub.delete_repo(NAME),
        "the tag 'production' of ns/tagger:1 stays": lambda: hub.delete_tag(NAME, tag="production"),
        "pull requests are not offered": lambda: hub.upload_file(
            path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, create_pr=True
        ),
        "'v1' is ns/tagger:1, which never changes": lambda: hub.upload_file(
            path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, revision="v1"
        ),
        "no tokens: everyone who reaches it reads it": lambda: hub.create_repo("ns/secret", private=True),
        "type is 'dataset', expected 'model'": lambda: hub.create_repo("ns/data", repo_type="dataset"),
        "'tagger' has no namespace in front": lambda: hub.create_repo("tagger"),
        "'plain' has no namespace in front": lambda: hub.delete_file("README.md", "plain"),
        "'Ns/Tagger' is not an adapter name": lambda: hub.create_repo("Ns/Tagger"),
    }
    for told, act in refused.items():
        with pytest.raises(HfHubHTTPError, match=told):
            act()
    hub.create_branch(NAME, branch="main", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        hub.delete_tag(NAME, tag="staging")
    with pytest.raises(RevisionNotFoundError):
        hub.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, revision="staging")
    with pytest.raises(RepositoryNotFoundError):
        hub.delete_repo("ns/none")
    hub.create_repo("ns/mistake")
    hub.delete_repo("ns/mistake")  # nothing in it was ever a version
    assert not hub.repo_exists("ns/mistake")
    assert (versions(local), local.aliases(), draft(local)) == ([1], {NAME: {"production": 1}}, {})


def test_a_card_with_wrong_metadata(hub):
    hub.create_repo(NAME)
    for card in ("---\nlicense: [mit\n---\n", "---\n- a\n---\n", "---\n" + "[" * 100_000 + "\n---\n"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            hub.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=NAME)
    for card in ("# no metadata", "---\n---\n", "---\ntags: [a]\n---\r\nand --- more"):
        hub.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=NAME)


def test_bodies_that_are_refused(hub):
    hub.create_repo(NAME)
    with httpx.Client() as web:
        for route in ("repos/create", "validate-yaml", f"models/{NAME}/preupload/main", f"models/{NAME}/tag/main"):
            for body in (b"", b"[]", b"{}", b"nonsense", b'{"name": 1, "content": 1, "files": 1, "tag": 1}'):
                answer = web.post(f"{hub.endpoint}/api/{route}", content=body)
                assert (answer.status_code, bool(answer.json()["error"])) == (400, True), (route, body, answer.text)


def test_tokens(local, folder, base):
    bases = TrustedBases.describe([f"tiny/base={base}"])
    with serving(create_app(local, {"s3cret": "ada"}, bases)) as url:
        nobody, ada = HfApi(endpoint=url, token=False), HfApi(endpoint=url, token="s3cret")
        for act in (
            lambda: nobody.create_repo(NAME),
            lambda: nobody.upload_folder(repo_id=NAME, folder_path=folder),
            lambda: nobody.create_tag(NAME, tag="v1"),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                act()
            assert caught.value.response.status_code == 401
        ada.create_repo(NAME, private=True)
        ada.upload_folder(repo_id=NAME, folder_path=folder)
        ada.create_tag(NAME, tag="production")
        assert local.resolve(NAME).created_by == "ada"
        assert local.history(NAME, "production")[0].who == "ada"


# --- gc, and processes that die ---


def test_gc_keeps_what_a_draft_holds(hub, local, folder, base):
    hub.create_repo(NAME)
    hub.upload_folder(repo_id=NAME, folder_path=folder)
    held = blobs(local)
    assert len(held) == len(content(folder))
    assert local.gc(grace_seconds=0).files == 0
    hub.create_tag(NAME, tag="v1")
    assert local.gc(grace_seconds=0).files == 0
    hub.upload_file(path_or_fileobj=b"not yet", path_in_repo="a.txt", repo_id=NAME)
    hub.delete_file("a.txt", NAME)
    assert local.gc(grace_seconds=0).files == 1
    assert blobs(local) > held
    assert local.verify() == []


@pytest.mark.parametrize("blobs_in", ["folder", "bucket"])
def test_drafts_in_postgresql(database, folder, base, tmp_path, request, blobs_in):
    store = request.getfixturevalue("bucket") if blobs_in == "bucket" else None
    with Registry(tmp_path / "registry", database=database, store=store) as shared:
        app = create_app(shared, bases=TrustedBases.describe([f"tiny/base={base}"]))
        with serving(app) as url, ThreadPoolExecutor(4) as pool, httpx.Client() as web:
            hub = HfApi(endpoint=url, token=False)
            hub.create_repo(NAME)
            hub.upload_folder(repo_id=NAME, folder_path=folder)
            notes = [added(f"notes/{number}.txt", b"%d" % number) for number in range(8)]
            assert {answer.status_code for answer in pool.map(lambda one: post_commit(web, url, [one]), notes)} == {200}
            assert shared.gc(grace_seconds=0).files == 0
            with pytest.raises(BadRequestError, match=f"these files are {NAME}:1, or would be, not {NAME}:2"):
                hub.create_tag(NAME, tag="v2")
            hub.create_tag(NAME, tag="production")
        assert len(shared.manifest(shared.resolve(NAME).digest).files) == len(content(folder)) + len(notes)
        assert shared.drafts.find(NAME) is None


def test_gc_during_commits(url, local):
    hub = HfApi(endpoint=url, token=False)
    hub.create_repo(NAME)
    with ThreadPoolExecutor(1) as pool, httpx.Client() as web:
        done = pool.submit(lambda: [post_commit(web, url, [added(f"{n}.txt", os.urandom(9))]) for n in range(30)])
        while not done.done():
            local.gc(grace_seconds=0)
        assert {answer.status_code for answer in done.result()} == {200}
    assert len(draft(local)) == 30
    assert all(local.store.fault(entry) is None for entry in local.drafts.find(NAME).files)


@contextmanager
def serving_command(root: Path, *options: str):
    """`registry serve` in a process of its own; yields it and the environment in which stock clients use it."""
    own = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from loraplex_registry.cli import main; main()"
    command = [sys.executable, "-c", code, "--registry", str(root), "serve", "--port", "0", *options]
    server = subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = server.stderr.readline().split()[-1]
        yield (
            server,
            own | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(root.parent / "hf"), "NO_COLOR": "1"},
        )
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        server.stderr.close()


def test_a_server_that_is_killed_inside_a_commit(local, folder, base, tmp_path):
    """Half of a commit was sent: nothing of it is there afterwards, and the upload again is whole."""
    np.save(folder / "large.npy", np.random.default_rng(0).random(1_000_000))
    options = ["--base", f"tiny/base={base}"]
    with serving_command(local.root, *options) as (server, environment):
        hub = HfApi(endpoint=environment["HF_ENDPOINT"], token=False)
        hub.create_repo(NAME)
        hub.upload_file(path_or_fileobj=b"before", path_in_repo="before.txt", repo_id=NAME)
        head, held = local.drafts.find(NAME), blobs(local)

        def half():
            yield b'{"key":"header","value":{"summary":"s"}}\n'
            yield json.dumps(added("after.txt", b"after")).encode() + b"\n"
            yield b'{"key":"file","value":{"path":"large.npy","content":"' + b"QUJD" * 500_000
            deadline = time.monotonic() + 20
            while not any(one.stat().st_size > 1_000_000 for one in local.store.staging.rglob("*.part")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            server.kill()
            yield b"QUJD" * 500_000

        with pytest.raises(httpx.TransportError):
            httpx.post(f"{hub.endpoint}/api/models/{NAME}/commit/main", content=half())
    assert (local.drafts.find(NAME), blobs(local)) == (head, held)
    with serving_command(local.root, *options) as (_, environment):
        hub = HfApi(endpoint=environment["HF_ENDPOINT"], token=False)
        hub.upload_folder(repo_id=NAME, folder_path=folder, delete_patterns="*")
        hub.create_tag(NAME, tag="v1")
    files = {entry.path: entry.bytes for entry in local.manifest(local.resolve(NAME).digest).files}
    assert files == {path: len(data) for path, data in content(folder).items()}
    assert local.verify() == []


KILLED = """
import os, pathlib, shutil, signal, sys
from pathlib import Path
from loraplex_registry.commit_stream import CommitReader
from loraplex_registry.hub_upload import _commit, _create, tag_revision
from loraplex_registry.registry import Registry
from loraplex_registry.sqlite import SqliteDatabase
from loraplex_registry.trusted_bases import TrustedBases
NAME = "ns/tagger"
parent, base, body = sys.argv[1:]
bases = TrustedBases.describe([base])
STEPS = ((os, "fsync"), (os, "link"), (pathlib.Path, "replace"), (pathlib.Path, "mkdir"), (SqliteDatabase, "writing"))

Registry(f"{parent}/empty").close()

def upload(root, fatal_call):
    shutil.copytree(f"{parent}/empty", root)
    calls = 0
    def counted(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))
    with Registry(root) as registry:
        upload_and_tag(registry, bases, pathlib.Path(body))
    os._exit(0)

ended = []
while 0 not in ended:
    children = []
    for fatal_call in range(len(ended) + 1, len(ended) + 9):
        pid = os.fork()
        if pid == 0:
            upload(f"{parent}/r{fatal_call}", fatal_call)
        children.append(pid)
    ended += [os.waitpid(pid, 0)[1] for pid in children]
print(*ended)
"""


def upload_and_tag(registry: Registry, bases: TrustedBases, body: Path) -> None:
    """What the server does for create_repo, for one commit and for create_tag."""
    _create(registry, NAME, "ada")
    with registry.store.stage() as folder:
        reader = CommitReader(folder, registry.limits.max_bytes)
        reader.write(body.read_bytes())
        _commit(registry, NAME, reader, "ada")
    tag_revision(registry, bases, NAME, "main", "production", "", "ada")


def test_killed_at_every_step_of_an_upload_and_its_tag(folder, base, tmp_path):
    """SIGKILL before the n-th flush, rename, mkdir or transaction, for every n: what is seen is whole, and the same
    acts again end with one version and its alias."""
    lines = [{"key": "header", "value": {"summary": "s"}}]
    lines += [added(path, data) for path, data in content(folder).items()]
    (tmp_path / "body").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    arguments = (tmp_path, f"tiny/base={base}", tmp_path / "body")
    code = KILLED.replace("def upload(", inspect.getsource(upload_and_tag) + "def upload(")
    output, _ = run_python(code, *arguments, stdout=subprocess.PIPE).communicate(timeout=60)
    ended = [int(status) for status in output.split()]
    steps = ended.index(0)
    assert steps > 20
    assert ended == [signal.SIGKILL] * steps + [0] * (len(ended) - steps)
    bases = TrustedBases.describe([f"tiny/base={base}"])

    def examine(step: int) -> tuple[int, int, int]:
        """What is there after the kill, in files of the draft, versions and aliases."""
        with Registry(tmp_path / f"r{step}") as registry:
            half = (len(draft(registry)), len(versions(registry)), len(registry.aliases()))
            assert registry.verify() == []
            registry.gc(grace_seconds=0)
            found = registry.drafts.find(NAME)
            assert not found or all(registry.store.fault(entry) is None for entry in found.files)
            upload_and_tag(registry, bases, tmp_path / "body")
            assert (versions(registry), registry.aliases()) == ([1], {NAME: {"production": 1}})
            assert (registry.drafts.find(NAME), registry.verify()) == (None, [])
            return half

    files = len(content(folder))
    with ThreadPoolExecutor(8) as pool:
        halves = set(pool.map(examine, range(1, steps + 1)))
    assert halves == {(0, 0, 0), (files, 0, 0), (files, 1, 0), (files, 1, 1)}


def test_a_client_that_goes_away(local, base):
    with serving_command(local.root) as (server, environment):
        HfApi(endpoint=environment["HF_ENDPOINT"], token=False).create_repo(NAME)

        def half():
            yield b'{"key":"header","value":{"summary":"s"}}\n{"key":"file","value":{"path":"a","content":"QUJD'
            raise KeyError("gone")

        with pytest.raises(KeyError):
            httpx.post(f"{environment['HF_ENDPOINT']}/api/models/{NAME}/commit/main", content=half())
        assert httpx.get(f"{environment['HF_ENDPOINT']}/health").status_code == 200
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=30)[1] == ""  # no traceback: it is nobody's fault
    assert (draft(local), list(local.store.staging.iterdir())) == ({}, [])


_PEFT = """
import sys
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForCausalLM

def answer(adapter, **options):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), adapter, **options)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits

expected = answer(sys.argv[2])
assert torch.equal(answer("ns/tagger", revision="production"), expected)
trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
trained.push_to_hub("ns/pushed", commit_message="by peft itself")
HfApi().create_tag("ns/pushed", tag="v1")
assert torch.equal(answer("ns/pushed"), expected)
"""


def test_the_hf_command_uploads_and_peft_loads(tmp_path):
    base = make_torch_base(tmp_path / "base")
    folder = make_adapter(tmp_path / "adapter", base, seed=1)
    (tmp_path / "tokens").write_text("ada s3cret")
    options = ["--base", str(base), "--token-file", str(tmp_path / "tokens")]
    with serving_command(tmp_path / "registry", *options) as (_, environment):
        environment |= {"HF_TOKEN": "s3cret"}

        def run(*arguments):
            return subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

        def hf(*arguments: str):
            return run(Path(sys.executable).with_name("hf"), *arguments)

        who = hf("auth", "whoami")
        assert (who.returncode, "ada" in who.stdout) == (0, True), who.stderr
        for _ in range(2):  # again changes nothing
            done = hf("upload", NAME, str(folder), "--commit-message", "trained")
            assert done.returncode == 0, done.stderr
        early = hf("download", NAME)
        assert (early.returncode, "Revision not found" in early.stderr) == (1, True), early
        tagged = hf("repos", "tag", "create", NAME, "production")
        assert tagged.returncode == 0, tagged.stderr
        bad = hf("upload", NAME, str(folder / "adapter_config.json"), "../x.json")
        assert bad.returncode != 0
        loaded = run(sys.executable, "-c", _PEFT, str(base), str(folder))
        assert loaded.returncode == 0, loaded.stderr
    with Registry(tmp_path / "registry") as registry:
        version = registry.resolve(f"{NAME}@production")
        assert (version.number, version.created_by, version.message) == (1, "ada", "trained")
        assert registry.resolve("ns/pushed:1").message == "by peft itself"
