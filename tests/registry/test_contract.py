"""What every registry does, wherever it lies: each test runs against all of them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplex_registry.errors import (
    BaseNotFound,
    CorruptBlob,
    DeletedVersion,
    FolderNotEmpty,
    InvalidAdapter,
    InvalidQuery,
    InvalidReference,
    InvalidRequest,
    NotDeleted,
    NothingToRollBack,
    RequirementNotMet,
    UnknownAdapter,
    UnknownAlias,
    UnknownDigest,
    UnknownVersion,
    VersionInUse,
)
from loraplex_registry.registry import Registry
from loraplex_registry.version import Fault

from .conftest import Adapter, make_base, make_receipt

pytestmark = pytest.mark.parametrize("registry", ["folder", "url", "postgres", "bucket"], indirect=True)

# --- push ---


def test_push_keeps_what_the_receipt_says(push, registry, base):
    version = push(message="first")
    assert (version.name, version.number, version.pushed) == ("quotes-tagger", 1, True)
    assert version.base.id == "tiny/base"
    assert version.base.fingerprint == make_receipt(base)["base"]["fingerprint"]
    assert version.base.quantization == "nf4+double:bfloat16"
    assert (version.rank, version.targets) == (4, ("down_proj", "up_proj"))
    assert version.metrics == {"tag_f1": 0.75, "stop_rate": 1.0}
    assert version.message == "first"
    assert version.created_by
    assert registry.versions("quotes-tagger") == [version]
    manifest = registry.manifest(version.digest)
    assert manifest.digest == version.digest
    assert version.bytes == sum(entry.bytes for entry in manifest.files)


def test_identical_bytes_make_no_new_version(push, registry, tmp_path):
    first = push()
    again = push()
    assert (again.number, again.digest, again.pushed) == (1, first.digest, False)
    assert push("other-name").number == 1
    assert push(seed=1).number == 2
    assert [version.number for version in registry.versions("quotes-tagger")] == [1, 2]
    with Registry(tmp_path / "elsewhere") as elsewhere:
        assert elsewhere.push("quotes-tagger", tmp_path / "made" / "quotes-tagger-0").digest == first.digest


def test_refused_pushes_leave_nothing(registry, store, base, tmp_path):
    folder = Adapter(config={"use_dora": True}).write(tmp_path / "adapter")
    with pytest.raises(InvalidAdapter, match="DoRA"):
        registry.push("x", folder, base=base)
    with pytest.raises(InvalidReference):
        registry.push("X!", folder, base=base)
    with pytest.raises(InvalidAdapter, match="at most 4,096 are kept"):
        registry.push("x", Adapter().write(tmp_path / "fine"), base=base, message="x" * 5000)
    assert registry.list() == []
    assert not store.staging.exists() or list(store.staging.iterdir()) == []
    assert list(store.place.all()) == []


def test_where_the_base_comes_from(registry, base, tmp_path):
    plain = Adapter().write(tmp_path / "plain")
    with pytest.raises(BaseNotFound, match=r"tiny/base.*--base"):
        registry.push("x", plain)
    assert registry.push("x", plain, base=base).base.fingerprint
    named = Adapter(config={"base_model_name_or_path": str(base)}).write(tmp_path / "named")
    assert registry.push("x", named).number == 2
    nameless = Adapter(config={"base_model_name_or_path": None}).write(tmp_path / "nameless")
    with pytest.raises(BaseNotFound, match="does not say which base"):
        registry.push("x", nameless)
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(InvalidAdapter, match="trained on base tiny/base fingerprint"):
        registry.push("x", Adapter().write(tmp_path / "r", make_receipt(base)), base=other)


def test_progress_counts_every_byte(registry, base, tmp_path):
    seen = []
    version = registry.push("x", Adapter().write(tmp_path / "a"), base=base, progress=seen.append)
    assert sum(seen) == version.bytes


def test_parent_is_kept(registry, push, base, tmp_path):
    parent = push().digest
    receipt = make_receipt(base, parent={"name": "quotes-tagger", "version": 1, "digest": parent})
    version = registry.push("quotes-tagger", Adapter(seed=3).write(tmp_path / "child", receipt))
    assert registry.resolve("quotes-tagger:2").parent == version.parent == parent


def test_audit_tells_all_that_was_done_newest_first(push, registry):
    push(message="first"), push(seed=1), push("other")
    registry.promote("quotes-tagger:1", "production", "it works")
    registry.promote("quotes-tagger:2", "production")
    registry.rollback("quotes-tagger@production", reason="it does not")
    registry.delete("quotes-tagger:2", "worse")
    registry.restore("quotes-tagger:2")
    acts = registry.audit()
    assert [(act.action, act.subject, act.reason) for act in reversed(acts)] == [
        ("push", "quotes-tagger:1", "first"),
        ("push", "quotes-tagger:2", ""),
        ("push", "other:1", ""),
        ("promote", "quotes-tagger@production: 1", "it works"),
        ("promote", "quotes-tagger@production: 1 → 2", ""),
        ("rollback", "quotes-tagger@production: 2 → 1", "it does not"),
        ("delete", "quotes-tagger:2", "worse"),
        ("restore", "quotes-tagger:2", ""),
    ]
    assert all(act.who for act in acts)
    assert [act.at for act in acts] == sorted((act.at for act in acts), reverse=True)
    assert registry.audit(limit=2) == acts[:2]
    assert [act.subject for act in registry.audit("other")] == ["other:1"]
    with pytest.raises(UnknownAdapter, match="the nearest is 'other'"):
        registry.audit("othr")
    with pytest.raises(InvalidRequest, match="limit is 0, expected 1 to 10,000"):
        registry.audit(limit=0)


# --- names ---


def test_a_bare_name_is_production_or_the_newest(push, registry):
    push()
    second = push(seed=1)
    assert registry.resolve("quotes-tagger") == second
    registry.promote("quotes-tagger:1", "production")
    assert registry.resolve("quotes-tagger").number == 1
    assert registry.resolve("quotes-tagger").aliases == ("production",)
    push(seed=2)
    assert registry.resolve("quotes-tagger").number == 1
    assert registry.resolve(f"quotes-tagger@{second.digest}") == second
    assert registry.resolve("quotes-tagger:3").number == 3


def test_list_shows_the_newest_of_each(push, registry):
    assert registry.list() == []
    push("b"), push("a"), push("a", seed=1)
    registry.promote("a:2", "staging")
    registry.promote("a:2", "production")
    registry.promote("b:1", "production")
    assert [str(version) for version in registry.list()] == ["a:2", "b:1"]
    assert registry.list()[0].aliases == ("production", "staging")
    assert registry.aliases() == {"a": {"production": 2, "staging": 2}, "b": {"production": 1}}


@pytest.mark.parametrize(
    ("ref", "error", "nearest"),
    [
        ("quotes-tager", UnknownAdapter, "quotes-tagger"),
        ("zzz", UnknownAdapter, None),
        ("quotes-tagger:7", UnknownVersion, "quotes-tagger:2"),
        ("quotes-tagger@prodution", UnknownAlias, "quotes-tagger@production"),
        ("quotes-tagger@zzz", UnknownAlias, "quotes-tagger@production"),
        ("quotes-tagger@sha256:" + "0" * 64, UnknownDigest, None),
    ],
)
def test_unknown_names_tell_the_nearest(push, registry, ref, error, nearest):
    push(), push(seed=1)
    registry.promote("quotes-tagger:1", "production")
    with pytest.raises(error) as caught:
        registry.resolve(ref)
    assert (caught.value.ref, caught.value.nearest) == (ref, nearest)
    assert ref in str(caught.value)
    assert nearest is None or nearest in str(caught.value)
    assert isinstance(caught.value, LookupError)


# --- aliases ---


def test_the_ledger_tells_every_move(push, registry):
    push(), push(seed=1), push(seed=2)
    registry.promote("quotes-tagger:1", "production", "first")
    registry.promote("quotes-tagger:2", "production")
    registry.promote("quotes-tagger:3", "production")
    assert not registry.promote("quotes-tagger:3", "production").moved
    assert registry.rollback("quotes-tagger@production").to_number == 2
    assert registry.rollback("quotes-tagger@production", reason="still bad").to_number == 1  # not back to 3
    with pytest.raises(NothingToRollBack, match="give --to VERSION"):
        registry.rollback("quotes-tagger@production")
    assert registry.rollback("quotes-tagger@production", to=3).from_number == 1
    moves = registry.history("quotes-tagger", "production")
    assert [(move.from_number, move.to_number, move.action) for move in moves] == [
        (None, 1, "promote"),
        (1, 2, "promote"),
        (2, 3, "promote"),
        (3, 2, "rollback"),
        (2, 1, "rollback"),
        (1, 3, "rollback"),
    ]
    assert moves[0].reason == "first"
    assert all(move.who for move in moves)
    assert moves[4].reason == "still bad"
    assert [move.at for move in moves] == sorted(move.at for move in moves)
    assert registry.resolve("quotes-tagger").number == 3


def test_moves_that_cannot_be(push, registry):
    push()
    with pytest.raises(UnknownVersion):
        registry.promote("quotes-tagger:2", "production")
    with pytest.raises(InvalidReference, match="is not an alias"):
        registry.promote("quotes-tagger:1", "Pro Duction")
    with pytest.raises(UnknownAlias):
        registry.rollback("quotes-tagger@production")
    registry.promote("quotes-tagger", "production")
    with pytest.raises(UnknownVersion):
        registry.rollback("quotes-tagger@production", to=9)
    assert len(registry.history("quotes-tagger", "production")) == 1


def test_an_alias_is_removed_and_the_ledger_says_so(push, registry):
    push(), push(seed=1), push(seed=2)
    registry.promote("quotes-tagger:1", "production")
    registry.promote("quotes-tagger:2", "production")
    removed = registry.remove_alias("quotes-tagger@production", "not ready")
    assert (removed.from_number, removed.to_number, removed.action) == (2, None, "remove")
    assert registry.aliases() == {}
    assert registry.resolve("quotes-tagger").number == 3  # the newest, as without production
    with pytest.raises(UnknownAlias):
        registry.resolve("quotes-tagger@production")
    with pytest.raises(UnknownAlias):
        registry.remove_alias("quotes-tagger@production")
    with pytest.raises(InvalidReference, match="names no alias"):
        registry.remove_alias("quotes-tagger:1")
    act = registry.audit()[0]
    assert (act.action, act.subject, act.reason) == ("remove", "quotes-tagger@production: 2 → nothing", "not ready")
    registry.delete("quotes-tagger:3")  # nothing holds it
    back = registry.rollback("quotes-tagger@production")
    assert (back.from_number, back.to_number) == (None, 2)
    registry.remove_alias("quotes-tagger@production")
    registry.promote("quotes-tagger:1", "production")
    assert registry.rollback("quotes-tagger@production").to_number == 2  # not to nothing
    tos = [move.to_number for move in registry.history("quotes-tagger", "production")]
    assert tos == [1, 2, None, 2, None, 1, 2]
    with registry.watch("quotes-tagger@production", after=0) as moves:
        assert [next(moves).to_number for _ in tos] == tos


def test_a_promotion_may_require_what_the_version_must_have(push, registry):
    push()  # tag_f1 0.75, stop_rate 1
    move = registry.promote("quotes-tagger:1", "production", "it works", require=["tag_f1>=0.7", "rank<=8"])
    assert move.reason == "it works; required tag_f1>=0.7, rank<=8"
    push(seed=1)
    with pytest.raises(RequirementNotMet, match=r"quotes-tagger:2: tag_f1>0\.75 is required, and it has 0\.75$"):
        registry.promote("quotes-tagger:2", "production", require=["rank=4", "tag_f1>0.75"])
    with pytest.raises(RequirementNotMet, match=r"f1>=0\.1 is required, and it has no f1 \(its metrics are .*tag_f1"):
        registry.promote("quotes-tagger:2", "production", require=["f1>=0.1"])
    with pytest.raises(InvalidQuery, match="'better' is not a comparison: expected for instance"):
        registry.promote("quotes-tagger:2", "production", require=["better"])
    assert [m.to_number for m in registry.history("quotes-tagger", "production")] == [1]


# --- delete and restore ---


def test_a_deleted_version_is_neither_found_nor_listed(push, registry):
    first, second = push(message="same words"), push(seed=1, message="same words")
    note = registry.delete("quotes-tagger:2", "wrong data")
    assert (str(note), note.action, note.reason) == ("quotes-tagger:2", "delete", "wrong data")
    for ref in ("quotes-tagger:2", f"quotes-tagger@{second.digest}"):
        with pytest.raises(DeletedVersion, match="to bring it back: registry restore quotes-tagger:2") as caught:
            registry.resolve(ref)
        assert (caught.value.ref, caught.value.who, caught.value.at) == (ref, note.who, note.at.isoformat())
    with pytest.raises(DeletedVersion):
        registry.promote("quotes-tagger:2", "production")
    with pytest.raises(DeletedVersion):
        registry.delete("quotes-tagger:2")
    with pytest.raises(UnknownVersion) as unknown:
        registry.resolve("quotes-tagger:3")
    assert unknown.value.nearest == "quotes-tagger:1"
    assert registry.resolve("quotes-tagger") == first
    assert registry.list() == registry.versions("quotes-tagger") == registry.search("same") == [first]
    assert push(seed=2).number == 3  # the number is never given again
    registry.delete("quotes-tagger:1"), registry.delete("quotes-tagger:3")
    assert registry.list() == []
    with pytest.raises(UnknownAdapter):
        registry.versions("quotes-tagger")
    with pytest.raises(UnknownAdapter):
        registry.resolve("quotes-tagger")
    assert push(seed=3).number == 4


def test_a_restored_version_is_what_it_was(push, registry, tmp_path):
    version = push()
    registry.delete("quotes-tagger:1")
    assert registry.restore("quotes-tagger:1", "still needed").action == "restore"
    assert registry.resolve("quotes-tagger") == version
    assert registry.pull("quotes-tagger:1", tmp_path / "out") == version
    with pytest.raises(NotDeleted, match="quotes-tagger:1 is not deleted"):
        registry.restore("quotes-tagger:1")
    with pytest.raises(UnknownVersion):
        registry.restore("quotes-tagger:9")


def test_the_same_bytes_again_restore_a_deleted_version(push, registry):
    first = push()
    push(seed=1)
    registry.delete("quotes-tagger:1")
    again = push()
    assert (again.number, again.digest, again.pushed, again.restored) == (1, first.digest, False, True)
    assert not push().restored
    assert [version.number for version in registry.versions("quotes-tagger")] == [1, 2]


def test_what_an_alias_points_to_is_not_deleted(push, registry):
    push(), push(seed=1)
    registry.promote("quotes-tagger:1", "production")
    registry.promote("quotes-tagger:1", "staging")
    with pytest.raises(VersionInUse, match="quotes-tagger@production, quotes-tagger@staging points to it"):
        registry.delete("quotes-tagger:1")
    for ref in ("quotes-tagger", "quotes-tagger@production"):
        with pytest.raises(InvalidReference, match="names no version by its number: expected for instance q"):
            registry.delete(ref)
        with pytest.raises(InvalidReference):
            registry.restore(ref)
    registry.promote("quotes-tagger:2", "production"), registry.promote("quotes-tagger:2", "staging")
    registry.delete("quotes-tagger:1")
    with pytest.raises(DeletedVersion):
        registry.rollback("quotes-tagger@production")
    with pytest.raises(DeletedVersion):
        registry.rollback("quotes-tagger@production", to=1)
    registry.restore("quotes-tagger:1")
    assert registry.rollback("quotes-tagger@production").to_number == 1


# --- search ---


@pytest.fixture
def many(registry, base, tmp_path):
    """a:1 and a:2 and ns/b:1, with other metrics, ranks, targets and messages."""
    made = [
        ("a", 4, {"f1": 0.5}, "the first"),
        ("a", 8, {"f1": 0.9, "eval/loss": 2}, "50% better"),
        ("ns/b", 4, {}, "other"),
    ]
    for seed, (name, rank, metrics, message) in enumerate(made):
        targets = ("q_proj",) if name == "ns/b" else ("up_proj", "down_proj")
        receipt = make_receipt(base, metrics=metrics)
        folder = Adapter(rank=rank, seed=seed, targets=targets).write(tmp_path / f"many-{seed}", receipt)
        registry.push(name, folder, message=message)
    registry.promote("a:1", "production")
    return registry


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["ns/b:1", "a:2", "a:1"]),
        ("f1>0.5", ["a:2"]),
        ("f1>=0.5", ["a:2", "a:1"]),
        ("f1!=0.5", ["a:2"]),
        ("f1=0.5 rank<8", ["a:1"]),
        ("eval/loss<3", ["a:2"]),
        ("rank=4", ["ns/b:1", "a:1"]),
        ("version=2", ["a:2"]),
        ("bytes>1e9", []),
        ("base:TINY", ["ns/b:1", "a:2", "a:1"]),
        ("base:llama", []),
        ("alias:production", ["a:1"]),
        ("alias:prod", []),
        ("target:q_proj", ["ns/b:1"]),
        ("target:proj", []),
        ("name:NS/", ["ns/b:1"]),
        ("FIRST", ["a:1"]),
        ("50%", ["a:2"]),
        ("5_%", []),
        ("the f1>0", ["a:1"]),
        ("digest:zz", []),
    ],
)
def test_a_search_finds_the_versions_for_which_all_terms_hold(many, query, found):
    assert [str(version) for version in many.search(query)] == found


def test_a_search_by_digest_parent_and_author(many, base, tmp_path):
    first = many.resolve("a:1")
    for text in (first.digest, first.digest[:20], first.digest[7:15]):
        assert many.search(f"digest:{text}") == [first]
    assert len(many.search(f"by:{first.created_by[:3].upper()}")) == 3
    receipt = make_receipt(base, parent={"name": "a", "version": 1, "digest": first.digest})
    child = many.push("child", Adapter(seed=9).write(tmp_path / "child", receipt))
    assert [v.digest for v in many.search(f"parent:{first.digest[7:20]}")] == [child.digest]


@pytest.mark.parametrize(
    ("sort", "found"),
    [
        ("f1", ["a:1", "a:2", "ns/b:1"]),  # who lacks it comes last, whichever way
        ("-f1", ["a:2", "a:1", "ns/b:1"]),
        ("name", ["a:2", "a:1", "ns/b:1"]),
        ("-rank", ["a:2", "a:1", "ns/b:1"]),
        ("created", ["a:1", "a:2", "ns/b:1"]),
    ],
)
def test_a_search_is_sorted_and_bounded(many, sort, found):
    assert [str(version) for version in many.search("", sort)] == found
    assert [str(version) for version in many.search("", sort, limit=2)] == found[:2]


@pytest.mark.parametrize(
    ("query", "sort", "limit", "said"),
    [
        ("f1>=high", "name", 10, "'f1>=high' is not a comparison: expected for instance f1>=0.9"),
        (">=1", "name", 10, "'>=1' is not a comparison"),
        ("owner:me", "name", 10, "'owner:me' asks for a field that there is not: expected comparisons"),
        ("x " * 51, "name", 10, "the query has 51 terms, at most 50 are taken"),
        ("", "a b", 10, "sort is 'a b', expected a metric"),
        ("", "name", 0, "limit is 0, expected 1 to 1,000"),
        ("", "name", 1001, "limit is 1001, expected 1 to 1,000"),
    ],
)
def test_a_search_that_cannot_be_read(registry, query, sort, limit, said):
    with pytest.raises(InvalidQuery) as caught:
        registry.search(query, sort, limit)
    assert said in str(caught.value)


# --- content ---


def test_pull_gives_back_the_bytes(push, registry, tmp_path):
    version = push()
    made = tmp_path / "made" / "quotes-tagger-0"
    assert registry.pull("quotes-tagger:1", tmp_path / "out" / "here") == version
    for file in made.iterdir():
        assert (tmp_path / "out" / "here" / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["here"]
    registry.pull("quotes-tagger:1", tmp_path / "out" / "here")  # again is fine: it holds exactly this
    push(seed=1)
    with pytest.raises(FolderNotEmpty, match="holds something else"):
        registry.pull("quotes-tagger:2", tmp_path / "out" / "here")
    (tmp_path / "empty").mkdir()
    assert registry.pull("quotes-tagger:2", tmp_path / "empty").number == 2


def spoil(store, sha256, how, file):
    data = b"".join(store.unproven(sha256))
    store.place.remove([sha256])
    if how != "missing":
        file.write_bytes(data[:-3] if how == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
        store.place.put(file, sha256)


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_damage_is_named_and_never_handed_out(push, registry, store, tmp_path, how):
    version, shared = push(), push("copy")
    healthy = push(seed=1)
    weights = next(e for e in registry.manifest(version.digest).files if e.path == "adapter_model.safetensors")
    assert registry.verify() == []
    spoil(store, weights.sha256, how, tmp_path / "spoilt")
    with pytest.raises(CorruptBlob, match=f"adapter_model.safetensors.*{weights.sha256}") as caught:
        registry.fetch(version.digest, tmp_path / "out")
    assert isinstance(caught.value, OSError)
    assert not (tmp_path / "out").exists()
    faults = registry.verify()
    assert [(fault.version, fault.path) for fault in faults] == [
        (str(shared), "adapter_model.safetensors"),
        (str(version), "adapter_model.safetensors"),
    ]
    assert all(fault.what.startswith(how) for fault in faults)
    assert registry.verify(str(healthy)) == []
    push()  # the same bytes again heal the store
    assert registry.verify() == []


def test_a_damaged_manifest_is_a_fault(push, registry, store, tmp_path):
    version = push()
    spoil(store, version.digest.removeprefix("sha256:"), "altered", tmp_path / "spoilt")
    assert registry.verify() == [Fault("quotes-tagger:1", "manifest.json", "altered")]
    with pytest.raises(CorruptBlob, match=r"manifest\.json"):
        registry.pull("quotes-tagger", tmp_path / "out")


def test_fetches_at_once_agree(push, registry, tmp_path):
    digest = push().digest
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: registry.fetch(digest, tmp_path / "out"), range(32)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "receipt.json",
    ]
