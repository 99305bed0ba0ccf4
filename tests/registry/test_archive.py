"""`registry export` and `registry import`: what comes out is what went in, and nothing else gets in."""

import io
import json
import tarfile

import pytest

from loraplex_registry.archive import export_versions, import_versions
from loraplex_registry.errors import BaseNotFound, InvalidAdapter, InvalidArchive, InvalidReference, InvalidRequest
from loraplex_registry.registry import Registry

from .conftest import Adapter, make_base, make_receipt


@pytest.fixture
def exported(push, registry, tmp_path):
    """Two versions of quotes-tagger and one of other, in a file."""
    push(message="first"), push(seed=1), push("other")
    file = tmp_path / "some.tar"
    refs = ["quotes-tagger:2", "quotes-tagger:1", "other", "quotes-tagger:2"]
    assert [str(version) for version in export_versions(registry, refs, file)] == [
        "other:1",
        "quotes-tagger:1",
        "quotes-tagger:2",
    ]
    return file


@pytest.fixture
def elsewhere(tmp_path):
    with Registry(tmp_path / "elsewhere") as registry:
        yield registry


def test_versions_keep_their_digests_numbers_and_messages(exported, registry, elsewhere, tmp_path):
    imported = list(import_versions(elsewhere, exported))
    assert [(str(v), v.pushed) for v in imported] == [
        ("other:1", True),
        ("quotes-tagger:1", True),
        ("quotes-tagger:2", True),
    ]
    for version in imported:
        there = registry.resolve(str(version))
        assert (version.digest, version.message, version.metrics) == (there.digest, there.message, there.metrics)
    assert elsewhere.verify() == []
    assert elsewhere.aliases() == {}
    assert [version.pushed for version in import_versions(elsewhere, exported)] == [False] * 3
    export_versions(elsewhere, ["other", "quotes-tagger:1", "quotes-tagger:2"], tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == exported.read_bytes()


def test_what_is_told_of_a_version_comes_along(registry, elsewhere, base, tmp_path):
    """Tags are in the index; card, metrics, lineage and parent are told by the files."""
    told = {"name": "night-run", "seed": 42, "steps": 240, "template": {"prompt": "{quote} ->:", "stop": ["##"]}}
    told |= {"data": {"train": {"path": "data/quotes.jsonl", "sha256": "ab" * 32}}}
    told |= {"parent": {"digest": f"sha256:{'c' * 64}"}}
    folder = Adapter().write(tmp_path / "told", make_receipt(base, **told))
    (folder / "README.md").write_text("# Quotes\n\nTags quotes.\n")
    registry.push("quotes-tagger", folder, message="why")
    there = registry.tag("quotes-tagger:1", add=["nlp", "beta"])
    export_versions(registry, ["quotes-tagger"], tmp_path / "one.tar")
    (version,) = import_versions(elsewhere, tmp_path / "one.tar")
    assert (version.tags, version.pushed) == (("beta", "nlp"), True)
    found = elsewhere.resolve("quotes-tagger:1")
    for what in ("digest", "description", "lineage", "metrics", "parent", "message", "tags", "base", "bytes"):
        assert getattr(found, what) == getattr(there, what), what
    assert elsewhere.card(found.digest) == registry.card(there.digest)
    assert [str(one) for one in elsewhere.search("tag:nlp")] == ["quotes-tagger:1"]
    elsewhere.tag("quotes-tagger:1", add=["mine"], remove=["beta"])
    (again,) = import_versions(elsewhere, tmp_path / "one.tar")
    assert (again.tags, again.pushed) == (("beta", "mine", "nlp"), False)


def test_a_file_of_before_tags_travelled(exported, registry, elsewhere, tmp_path):
    def older(member, data):
        if member.name != "index.json":
            return data
        told = json.loads(data)
        assert [entry.pop("tags") for entry in told["versions"]] == [[], [], []]
        return json.dumps(told).encode()

    imported = list(import_versions(elsewhere, rewritten(exported, older, tmp_path)))
    assert [version.tags for version in imported] == [(), (), ()]


def test_into_the_same_registry_under_another_name(push, registry, tmp_path):
    version = push()
    export_versions(registry, ["quotes-tagger"], tmp_path / "one.tar")
    (copy,) = import_versions(registry, tmp_path / "one.tar", name="team/copy")
    assert (str(copy), copy.digest) == ("team/copy:1", version.digest)
    with pytest.raises(InvalidReference):
        list(import_versions(registry, tmp_path / "one.tar", name="Not A Name"))


def test_one_name_cannot_stand_for_several(exported, elsewhere):
    with pytest.raises(InvalidRequest, match="holds other, quotes-tagger: one name"):
        list(import_versions(elsewhere, exported, name="x"))
    assert elsewhere.list() == []


def test_a_base_that_lies_elsewhere(registry, base, elsewhere, tmp_path):
    """Neither receipt nor configuration says where: the base of the export is known by its weights."""
    folder = Adapter(config={"base_model_name_or_path": None}).write(tmp_path / "a")
    version = registry.push("x", folder, base=base)
    export_versions(registry, ["x"], tmp_path / "x.tar")
    with pytest.raises(BaseNotFound, match="does not say which base"):
        list(import_versions(elsewhere, tmp_path / "x.tar"))
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(InvalidAdapter, match=f"was checked against base {base} fingerprint sha256:"):
        list(import_versions(elsewhere, tmp_path / "x.tar", base=other))
    base.rename(tmp_path / "moved")
    (imported,) = import_versions(elsewhere, tmp_path / "x.tar", base=tmp_path / "moved")
    assert imported.digest == version.digest


def test_a_file_that_is_there_stays(push, registry, tmp_path):
    push()
    (tmp_path / "mine.tar").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        export_versions(registry, ["quotes-tagger"], tmp_path / "mine.tar")
    assert (tmp_path / "mine.tar").read_text() == "mine"


def test_a_damaged_blob_is_not_exported(push, registry, store, tmp_path):
    entry = registry.manifest(push().digest).files[0]
    store.place.path(entry.sha256).write_bytes(b"altered")
    with pytest.raises(OSError, match=entry.path):
        export_versions(registry, ["quotes-tagger"], tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()
    assert not list(tmp_path.glob(".x.tar*"))


def rewritten(file, change, tmp_path):
    """The file with every (name, type, data) passed through ``change``; None leaves it out."""
    with tarfile.open(file) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(tmp_path / "changed.tar", "w") as tar:
        for member, data in members:
            if (found := change(member, data)) is not None:
                member.size = len(found)
                tar.addfile(member, io.BytesIO(found))
    return tmp_path / "changed.tar"


def altered(member, data):
    return data[:-1] + bytes([data[-1] ^ 1]) if data[:1] != b"{" else data


def without_weights(member, data):
    return None if data[:1] != b"{" else data


def escaping(member, data):
    member.name = member.name.replace("blobs/sha256/", "blobs/sha256/../../../")
    return data


def absolute(member, data):
    member.name = member.name.replace("blobs/", "/tmp/blobs/")
    return data


def link(member, data):
    if member.name != "index.json":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return b""
    return data


def index(**changes):
    def change(member, data):
        if member.name != "index.json":
            return data
        told = json.loads(data)
        for entry in told["versions"]:
            entry.update(changes.get("entry", {}))
        return json.dumps(told | {k: v for k, v in changes.items() if k != "entry"}).encode()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (altered, "is not what its name says"),
        (without_weights, "is not whole in this file"),
        (escaping, "expected nothing but files in blobs/sha256/"),
        (absolute, "expected nothing but files in blobs/sha256/"),
        (link, "expected nothing but files in blobs/sha256/"),
        (index(format="loraplex.export/9"), "has format 'loraplex.export/9', expected 'loraplex.export/1'"),
        (index(versions="all"), "is no export of a registry: versions"),
        (index(entry={"digest": "sha256:../../../etc"}), "cannot be read"),
        (index(entry={"digest": "sha256:" + "0" * 64}), "is not whole in this file"),
        (index(entry={"tags": ["fine", "No tag"]}), "'No tag' is not a tag"),
        (index(entry={"tags": "nlp"}), "is no export of a registry: versions.0.tags"),
    ],
)
def test_nothing_in_the_file_is_trusted(exported, elsewhere, tmp_path, change, said):
    with pytest.raises(InvalidArchive, match=said):
        list(import_versions(elsewhere, rewritten(exported, change, tmp_path)))
    assert elsewhere.list() == []


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 10240])
def test_other_files_are_no_exports(elsewhere, tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InvalidArchive, match="is no export of a registry"):
        list(import_versions(elsewhere, tmp_path / "x"))


def test_a_file_cut_short(exported, elsewhere, tmp_path):
    for size in range(600, exported.stat().st_size - 20480, 5000):
        (tmp_path / "cut").write_bytes(exported.read_bytes()[:size])
        with pytest.raises(InvalidArchive):
            list(import_versions(elsewhere, tmp_path / "cut"))
    assert elsewhere.list() == []
