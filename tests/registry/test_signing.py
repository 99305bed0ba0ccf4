"""Signatures: made by one key, checked by others' own; in a folder, over HTTP, through an export, and by openssl."""

import base64
import json
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraplex_registry.archive import export_versions, import_versions
from loraplex_registry.cli import cli
from loraplex_registry.errors import (
    Forbidden,
    InvalidArchive,
    InvalidKey,
    InvalidReference,
    NotSigned,
    UnknownDigest,
)
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry, open_registry
from loraplex_registry.signing import PublicKey, create_key, sign, statement

from .conftest import served


@pytest.fixture
def release(tmp_path) -> Path:
    create_key(tmp_path / "release.key")
    return tmp_path / "release.key"


@pytest.fixture
def other(tmp_path) -> Path:
    create_key(tmp_path / "other.key")
    return tmp_path / "other.key"


def public(key: Path) -> PublicKey:
    return PublicKey.read(key.with_name(key.name + ".pub"))


@contextmanager
def here(tmp_path) -> Iterator[Registry]:
    """The store of the fixture `registry`, opened once more beside it."""
    with open_registry(tmp_path / "registry") as local:
        assert isinstance(local, Registry)
        yield local


def add(registry, version, key: Path):
    return registry.signatures.add(version.digest, *sign(version.digest, key))


# --- keys ---


def test_a_key_is_two_files_and_one_is_secret(release):
    assert stat.S_IMODE(release.stat().st_mode) == 0o600
    assert release.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert release.with_name("release.key.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")
    assert public(release).id.startswith("ed25519:")
    with pytest.raises(FileExistsError, match="is there already"):
        create_key(release)
    release.unlink()
    with pytest.raises(FileExistsError, match=r"release\.key\.pub' is there already"):
        create_key(release)
    assert not release.exists()


def test_keys_that_cannot_be_used(release, tmp_path):
    digest = "sha256:" + "0" * 64
    release.chmod(0o644)
    with pytest.raises(InvalidKey, match=r"others can read the private key .* \(mode 644\), expected 600"):
        sign(digest, release)
    release.chmod(0o600)
    with pytest.raises(InvalidKey, match="No such file"):
        sign(digest, tmp_path / "none")
    with pytest.raises(InvalidKey, match="holds no private key"):
        sign(digest, _private(tmp_path / "public", release.with_name("release.key.pub").read_text()))
    with pytest.raises(InvalidKey, match="holds no public key") as caught:
        PublicKey.read(release)
    assert "PRIVATE" not in str(caught.value)
    for text in ("", "x", base64.b64encode(b"x" * 31).decode(), base64.b64encode(b"x" * 32).decode() + "\n"):
        with pytest.raises(InvalidKey, match="expected 32 bytes as base64"):
            PublicKey.parse(text)


def _private(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o600)
    return file


@pytest.mark.skipif(not shutil.which("openssl"), reason="apt-get install openssl")
def test_openssl_reads_the_keys_and_agrees(release, tmp_path):
    digest = "sha256:" + "1" * 64
    (tmp_path / "statement").write_bytes(statement(digest))
    (tmp_path / "signature").write_bytes(base64.b64decode(sign(digest, release)[1]))
    arguments = ["-rawin", "-in", "statement", "-sigfile", "signature", "-pubin", "-inkey", "release.key.pub"]
    verify = ["openssl", "pkeyutl", "-verify", *arguments]
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "statement").write_bytes(statement("sha256:" + "2" * 64))
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True).returncode != 0
    made = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", "foreign.key"]
    assert subprocess.run(made, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "foreign.key").chmod(0o600)
    sign(digest, tmp_path / "foreign.key")
    made = ["openssl", "genpkey", "-algorithm", "x25519", "-out", "kind.key"]
    assert subprocess.run(made, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "kind.key").chmod(0o600)
    with pytest.raises(InvalidKey, match="a key of another kind, expected ed25519"):
        sign(digest, tmp_path / "kind.key")


# --- the same in a folder and behind a URL ---


def test_a_signature_is_kept_with_who_and_when(push, registry, release, other):
    version = push()
    assert registry.signatures.of(version.digest) == []
    first = add(registry, version, release)
    assert (first.digest, first.key, first.key_id) == (version.digest, public(release).text, public(release).id)
    assert first.who
    second = add(registry, version, other)
    assert registry.signatures.of(version.digest) == [first, second]
    assert add(registry, version, release) == first  # again is nothing new
    signed = [act for act in registry.audit("quotes-tagger") if act.action == "sign"]
    assert [(act.subject, act.reason) for act in signed] == [
        ("quotes-tagger:1", public(other).id),
        ("quotes-tagger:1", public(release).id),
    ]


def test_what_does_not_hold_is_not_kept(push, registry, release, other):
    version, second = push(), push(seed=1)
    key, signature = sign(version.digest, release)
    for digest, given, error, said in (
        (second.digest, signature, InvalidKey, "the signature is not ed25519:"),
        (version.digest, sign(version.digest, other)[1], InvalidKey, "the signature is not ed25519:"),
        (version.digest, "x", InvalidKey, "expected 64 bytes as base64"),
        ("sha256:x", signature, InvalidReference, "is not a digest"),
    ):
        with pytest.raises(error, match=said):
            registry.signatures.add(digest, key, given)
    with pytest.raises(InvalidKey, match="the public key is 'x', expected 32 bytes as base64"):
        registry.signatures.add(version.digest, "x", signature)
    unknown = "sha256:" + "0" * 64
    with pytest.raises(UnknownDigest):
        registry.signatures.add(unknown, *sign(unknown, release))
    assert registry.signatures.of(version.digest) == registry.signatures.of(second.digest) == []


def test_a_pull_takes_only_what_is_signed_as_wanted(push, registry, release, other, tmp_path):
    version = push()
    with pytest.raises(NotSigned, match=f"quotes-tagger:1 .*has to be signed by {public(release).id}, .*by nobody"):
        registry.pull("quotes-tagger", tmp_path / "out", signed_by=[public(release)])
    add(registry, version, other)
    with pytest.raises(NotSigned, match=f"signed only by {public(other).id}"):
        registry.pull("quotes-tagger", tmp_path / "out", signed_by=[public(release)])
    assert not (tmp_path / "out").exists()
    assert registry.pull("quotes-tagger", tmp_path / "out", signed_by=[public(release), public(other)]) == version
    add(registry, version, release)
    assert registry.pull("quotes-tagger", tmp_path / "two", signed_by=[public(release)]) == version


def test_a_signature_that_was_altered_in_the_catalog_is_refused(push, registry, store, release, tmp_path):
    version, second = push(), push(seed=1)
    add(registry, version, release)
    with here(tmp_path) as local, local.catalog.writing() as db:  # the other version's, moved here
        db.exec_driver_sql(f"UPDATE signatures SET digest = '{second.digest}'")
    with pytest.raises(NotSigned, match=f"quotes-tagger:2 .* has a signature by {public(release).id} that is wrong"):
        registry.pull("quotes-tagger:2", tmp_path / "out", signed_by=[public(release)])
    assert add(registry, second, release)  # signing again mends it
    assert registry.pull("quotes-tagger:2", tmp_path / "out", signed_by=[public(release)]) == second


def test_signatures_travel_in_an_export(push, registry, release, tmp_path):
    version, file = push(), tmp_path / "one.tar"
    add(registry, version, release)
    export_versions(registry, ["quotes-tagger"], file)
    again = tmp_path / "again.tar"
    export_versions(registry, ["quotes-tagger"], again)
    assert file.read_bytes() == again.read_bytes()
    with Registry(tmp_path / "elsewhere") as elsewhere:
        (imported,) = import_versions(elsewhere, file)
        assert elsewhere.pull("quotes-tagger", tmp_path / "out", signed_by=[public(release)]) == imported
    with tarfile.open(file) as tar:
        stream = tar.extractfile("index.json")
        assert stream
        index = json.loads(stream.read())
    index["versions"][0]["signatures"][0]["signature"] = base64.b64encode(b"x" * 64).decode()
    with tarfile.open(file) as tar, tarfile.open(tmp_path / "forged.tar", "w") as forged:
        for member in tar:
            data = json.dumps(index).encode() if member.name == "index.json" else None
            if data is None:
                forged.addfile(member, tar.extractfile(member))
            else:
                (tmp_path / "index.json").write_bytes(data)
                forged.add(tmp_path / "index.json", "index.json")
    with Registry(tmp_path / "third") as third:
        with pytest.raises(InvalidArchive, match=r"a signature of quotes-tagger:1 is not its key's"):
            list(import_versions(third, tmp_path / "forged.tar"))
        assert third.list() == []


# --- tokens ---


def test_who_may_sign(push, registry, release, tmp_path):
    version = push()
    with here(tmp_path) as local, served(local, {"root": "root"}) as url:
        secrets = {
            scope: local.tokens.create(scope, [scope], prefix).secret
            for scope, prefix in (("read", ""), ("push", ""), ("admin", "other-"))
        }
        with RemoteRegistry(url, secrets["read"]) as reader, pytest.raises(Forbidden, match="needs the scope 'push'"):
            add(reader, version, release)
        with RemoteRegistry(url, secrets["push"]) as pusher:
            assert add(pusher, version, release).who == "push"
        with RemoteRegistry(url, secrets["read"]) as reader:
            assert len(reader.signatures.of(version.digest)) == 1
            assert reader.pull("quotes-tagger", tmp_path / "out", signed_by=[public(release)]) == version
        with RemoteRegistry(url, secrets["admin"]) as elsewhere:  # of other names: nothing is there
            assert elsewhere.signatures.of(version.digest) == []
            with pytest.raises(UnknownDigest):
                add(elsewhere, version, release)


# --- the command ---


@pytest.fixture(params=["folder", "url"])
def run(request, tmp_path, monkeypatch):
    """run("sign", …) in an empty folder, on a registry that has quotes-tagger:1."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str):
        return CliRunner().invoke(cli, ["--registry", where, *arguments])

    with Registry(tmp_path / "registry") as local, served(local) as url:
        where = str(tmp_path / "registry") if request.param == "folder" else url
        yield run


def test_sign_verify_and_pull(run, base, tmp_path):
    from .conftest import Adapter, make_receipt

    run("push", "quotes-tagger", str(Adapter().write(tmp_path / "made", make_receipt(base))))
    created = run("key", "create", "release.key")
    assert created.exit_code == 0
    key_id = created.stdout.split()[1].rstrip(":")
    assert "release.key.pub" in created.stdout
    unsigned = run("verify", "quotes-tagger:1", "--signed-by", "release.key.pub")
    assert (unsigned.exit_code, unsigned.stdout) == (1, "")
    assert unsigned.stderr.startswith("error: quotes-tagger:1 (sha256:")
    assert unsigned.stderr.endswith(f"has to be signed by {key_id}, and is signed by nobody\n")
    refused = run("pull", "quotes-tagger:1", "signed", "--signed-by", "release.key.pub")
    assert (refused.exit_code, refused.stderr) == (1, unsigned.stderr)
    assert not Path("signed").exists()
    signed = run("sign", "quotes-tagger:1", "--key", "release.key")
    assert signed.stdout.startswith("signed quotes-tagger:1 sha256:")
    assert signed.stdout.endswith(f" by {key_id}\n")
    whole = run("verify", "quotes-tagger", "--signed-by", "release.key.pub")
    assert whole.stdout == "quotes-tagger:1: every file is what its digest says and signed as wanted\n"
    assert run("pull", "quotes-tagger:1", "signed", "--signed-by", "release.key.pub").exit_code == 0
    assert f"{key_id} by " in run("show", "quotes-tagger").stdout
    (shown,) = json.loads(run("show", "quotes-tagger", "--format", "json").stdout)["signatures"]
    assert shown["key_id"] == key_id
    assert run("verify", "--all", "--signed-by", "release.key.pub").exit_code == 2
    wrong = run("sign", "quotes-tagger:1", "--key", "release.key.pub")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert "BEGIN" not in wrong.stderr
