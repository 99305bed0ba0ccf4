"""The `registry` command as a user meets it: words, tables, JSON, exit codes; on a folder and on a URL."""

import json
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from loraplex_registry.cli import cli
from loraplex_registry.registry import Registry

from .conftest import Adapter, make_receipt, served


@dataclass
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


@pytest.fixture(params=["folder", "url"])
def run(request, tmp_path, monkeypatch):
    """run("list", …) in an empty working folder; LORAPLEX_REGISTRY names the same store twice over."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: object) -> Answer:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    if request.param == "folder":
        monkeypatch.setenv("LORAPLEX_REGISTRY", str(tmp_path / "registry"))
        yield run
        return
    with Registry(tmp_path / "registry") as local, served(local) as url:
        monkeypatch.setenv("LORAPLEX_REGISTRY", url)
        yield run


@pytest.fixture
def trained(run, base, tmp_path):
    """The trainer's output for quotes-tagger, where push looks for it, and a second try of it."""
    Adapter(rank=8, seed=1).write(tmp_path / "second", make_receipt(base))
    return Adapter().write(tmp_path / "work" / "adapters" / "quotes-tagger", make_receipt(base))


def test_search_and_a_required_metric(run, trained, tmp_path):
    run("push", "quotes-tagger"), run("push", "quotes-tagger", tmp_path / "second")
    refused = run("promote", "quotes-tagger:1", "--to", "production", "--require", "tag_f1>=0.9")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == (
        "error: quotes-tagger@production does not move to quotes-tagger:1: tag_f1>=0.9 is required, and it has 0.75\n"
    )
    head, *rows = run("search", "tag_f1>=0.7", "base:tiny", "--sort", "-rank").out.splitlines()
    assert head.split()[:2] == ["version", "aliases"]
    assert [row.split()[0] for row in rows] == ["quotes-tagger:2", "quotes-tagger:1"]
    found = json.loads(run("search", "rank<8", "--format", "json").out)
    assert [version["number"] for version in found] == [1]
    assert run("search", "zebra").out == "no version matches\n"
    wrong = run("search", "f1>>1")
    assert (wrong.code, wrong.err.startswith("error: 'f1>>1' is not a comparison")) == (1, True)


def test_a_table_has_the_adapters_metrics_and_one_version_the_bases_too(run, trained):
    receipt = json.loads((trained / "receipt.json").read_text())
    receipt["metrics"] |= {"base_tag_f1": 0.125}
    (trained / "receipt.json").write_text(json.dumps(receipt))
    run("push", "quotes-tagger")
    for table in (run("list").out, run("versions", "quotes-tagger").out):
        assert "tag_f1 0.75" in table and "base_tag_f1" not in table
    assert "base_tag_f1 0.125" in run("show", "quotes-tagger").out


@pytest.mark.parametrize("where", ["htps://registry.example/x", "s3://bucket", "FTP://host"])
def test_a_url_that_is_no_registrys_does_not_become_a_folder(run, trained, where, tmp_path):
    for command in (["push", "quotes-tagger"], ["list"], ["serve", "--port", "0"]):
        answer = run(*command, "--registry", where)
        assert answer.code == 1
        assert answer.err == f"error: the registry '{where}': expected a folder, http:// or https://\n"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["adapters"]


def test_aliases_are_set_and_removed(run, trained):
    run("push", "quotes-tagger")
    assert run("alias", "set", "quotes-tagger:1", "staging").out == "quotes-tagger@staging: quotes-tagger:1\n"
    removed = run("alias", "rm", "quotes-tagger@staging", "--reason", "done")
    assert removed.out == "quotes-tagger@staging: quotes-tagger:1 → nothing\n"
    assert run("alias", "history", "quotes-tagger@staging").out == run("history", "quotes-tagger@staging").out
    moves = json.loads(run("history", "quotes-tagger@staging", "--format", "json").out)
    assert [(move["to_number"], move["action"]) for move in moves] == [(None, "remove"), (1, "promote")]
    again = run("alias", "rm", "quotes-tagger@staging")
    assert (again.code, again.err.startswith("error: ")) == (1, True)


def test_diff_shows_what_is_not_the_same(run, trained, tmp_path):
    run("push", "quotes-tagger"), run("push", "quotes-tagger", tmp_path / "second")
    facts, modules = run("diff", "quotes-tagger:1", "quotes-tagger:2").out.split("\n\n")
    head, *rows = facts.splitlines()
    assert head.split() == ["quotes-tagger:1", "quotes-tagger:2"]
    assert ["rank", "4", "8"] in [row.split() for row in rows]
    assert not any(row.startswith(("base", "targets", "metrics")) for row in rows)
    said, _, *rows = modules.splitlines()
    assert said == "|ΔW|, what is added to 4 modules, and their cosine; the furthest apart first:"
    cosines = [float(row.split()[-1]) for row in rows]
    assert cosines == sorted(cosines)
    assert (
        len(run("diff", "quotes-tagger:1", "quotes-tagger:2", "--modules", "1").out.splitlines())
        == len(facts.splitlines()) + 4
    )
    told = json.loads(run("diff", "quotes-tagger:1", "quotes-tagger:2", "--format", "json").out)
    assert (told["before"], told["after"], len(told["updates"])) == ("quotes-tagger:1", "quotes-tagger:2", 4)
    same = run("diff", "quotes-tagger:1", "quotes-tagger:1")
    assert same.out == "quotes-tagger:1 and quotes-tagger:1 are the same bytes\n"
    assert run("diff", "quotes-tagger:1", "other").code == 1


def test_export_and_import(run, trained, tmp_path):
    run("push", "quotes-tagger"), run("push", "quotes-tagger", tmp_path / "second")
    file = tmp_path / "both.tar"
    said = run("export", "quotes-tagger:1", "quotes-tagger:2", "-o", file).out
    assert said.startswith(f"exported quotes-tagger:1, quotes-tagger:2 to {file} (")
    assert run("export", "quotes-tagger:1", "-o", file).err == f"error: '{file}' is there already; name a new file\n"
    first, second = run("import", file, "--as", "copy").out.splitlines()
    assert first.startswith("imported copy:1 sha256:")
    assert second.startswith("imported copy:2 sha256:")
    assert run("import", file).out.startswith("already quotes-tagger:1 sha256:")
    run("delete", "quotes-tagger:1")
    assert run("import", file).out.startswith("restored quotes-tagger:1 sha256:")
    missing = run("import", tmp_path / "none.tar")
    assert (missing.code, missing.err.startswith("error: ")) == (1, True)


def test_delete_and_restore(run, trained):
    run("push", "quotes-tagger")
    deleted = run("delete", "quotes-tagger:1", "--reason", "wrong data")
    assert deleted.out == "deleted quotes-tagger:1; to bring it back: registry restore quotes-tagger:1\n"
    gone = run("show", "quotes-tagger:1")
    assert (gone.code, gone.err.startswith("error: 'quotes-tagger:1' was deleted by ")) == (1, True)
    assert run("restore", "quotes-tagger:1").out == "restored quotes-tagger:1\n"
    run("delete", "quotes-tagger:1")
    assert run("push", "quotes-tagger").out.startswith("restored quotes-tagger:1 sha256:")
    run("promote", "quotes-tagger:1", "--to", "production")
    refused = run("delete", "quotes-tagger:1")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == (
        "error: quotes-tagger:1 is not deleted: quotes-tagger@production points to it; promote another one first\n"
    )


def test_gc(run, trained, tmp_path):
    run("push", "quotes-tagger"), run("push", "quotes-tagger", tmp_path / "second")
    assert run("gc").out == "0 files, 0 bytes, removed\n"
    first, last = run("gc", "--keep", "1", "--dry-run", "--grace", "0s").out.splitlines()[::2]
    assert first == "quotes-tagger:1: would be deleted, the newest 1 are kept"
    assert last.endswith(", would be removed")
    assert run("gc", "--keep", "1").out.splitlines()[0] == "quotes-tagger:1: deleted, the newest 1 are kept"
    purged, removed = run("gc", "--grace", "0s").out.splitlines()
    assert purged == "quotes-tagger:1: purged, it was deleted before the grace"
    assert (removed[:8], removed[-9:]) == ("3 files,", ", removed")
    wrong = run("gc", "--grace", "soon")
    assert (wrong.code, "'soon', expected a number and s, m, h or d, for instance 2h" in wrong.err) == (2, True)


def test_audit(run, trained):
    run("push", "quotes-tagger", "-m", "the first"), run("promote", "quotes-tagger:1", "--to", "production")
    head, moved, pushed = run("audit", "quotes-tagger").out.splitlines()
    assert head.split() == ["when", "who", "did", "what", "reason"]
    assert " promote " in moved and "quotes-tagger@production: 1" in moved
    assert " push " in pushed and pushed.endswith("the first")
    (newest,) = json.loads(run("audit", "--limit", "1", "--format", "json").out)
    assert (newest["action"], newest["subject"]) == ("promote", "quotes-tagger@production: 1")


def test_an_empty_registry_says_what_to_do(run):
    answer = run("list")
    assert answer.code == 0
    assert answer.out.startswith("no adapters yet in ")
    assert answer.out.endswith("keep the first with: registry push NAME [DIR]\n")
    assert json.loads(run("list", "--format", "json").out) == []


def test_the_whole_life_of_an_adapter(run, trained, tmp_path):
    pushed = run("push", "quotes-tagger", "-m", "the first")
    assert pushed.out.startswith("pushed quotes-tagger:1 (")
    assert run("push", "quotes-tagger").out.startswith("already quotes-tagger:1 sha256:")
    assert run("push", "quotes-tagger", tmp_path / "second").out.startswith("pushed quotes-tagger:2 (")
    moved = run("promote", "quotes-tagger:1", "--to", "production", "--reason", "it works")
    assert moved.out == "quotes-tagger@production: quotes-tagger:1\n"
    again = run("promote", "quotes-tagger:1", "--to", "production")
    assert again.out == "quotes-tagger@production already points to quotes-tagger:1\n"
    moved = run("promote", "quotes-tagger:2", "--to", "production")
    assert moved.out == "quotes-tagger@production: quotes-tagger:1 → quotes-tagger:2\n"
    moved = run("rollback", "quotes-tagger@production")
    assert moved.out == "quotes-tagger@production: quotes-tagger:2 → quotes-tagger:1\n"

    head, row = run("list").out.splitlines()
    assert head.split() == ["adapter", "newest", "aliases", "base", "rank", "size", "metrics", "pushed"]
    assert row.split()[:6] == ["quotes-tagger", "2", "production", "→", "1", "tiny/base"]
    assert "tag_f1 0.75, stop_rate 1" in row
    _, second, first = run("versions", "quotes-tagger").out.splitlines()
    assert second.startswith("quotes-tagger:2 ")
    assert first.split()[:2] == ["quotes-tagger:1", "production"]
    assert "the first" in first
    _, latest, *_, oldest = run("history", "quotes-tagger@production").out.splitlines()
    assert "rollback" in latest
    assert "it works" in oldest
    shown = run("show", "quotes-tagger").out
    for word in ("quotes-tagger:1", "nf4+double:bfloat16", "down_proj, up_proj", "adapter_model.safetensors"):
        assert word in shown

    assert run("pull", "quotes-tagger").out.startswith("pulled quotes-tagger:1 to quotes-tagger sha256:")
    pulled = tmp_path / "work" / "quotes-tagger"
    assert all((pulled / file.name).read_bytes() == file.read_bytes() for file in trained.iterdir())
    for what in ((), ("--all",)):
        assert run("verify", *what).out == "all versions: every file is what its digest says\n"
    assert run("verify", "quotes-tagger:2").out == "quotes-tagger:2: every file is what its digest says\n"


def test_json(run, trained):
    run("push", "quotes-tagger")
    run("promote", "quotes-tagger:1", "--to", "production")
    (listed,) = json.loads(run("list", "--format", "json").out)
    (version,) = json.loads(run("versions", "quotes-tagger", "--format", "json").out)
    shown = json.loads(run("show", "quotes-tagger", "--format", "json").out)
    (move,) = json.loads(run("history", "quotes-tagger@production", "--format", "json").out)
    assert shown["version"] == version == {key: value for key, value in listed.items() if key != "pointers"}
    assert listed["pointers"] == {"production": 1}
    assert (version["number"], version["aliases"], version["rank"]) == (1, ["production"], 4)
    assert len(shown["manifest"]["files"]) == 3
    assert (move["from_number"], move["to_number"], move["action"]) == (None, 1, "promote")
    assert json.loads(run("verify", "--format", "json").out) == []


def test_verify_names_damage_and_fails(run, trained, store):
    run("push", "quotes-tagger")
    shown = json.loads(run("show", "quotes-tagger", "--format", "json").out)
    weights = next(f for f in shown["manifest"]["files"] if f["path"] == "adapter_model.safetensors")
    store.place.path(weights["sha256"]).write_bytes(b"short")
    answer = run("verify")
    assert answer.code == 1
    row = answer.out.splitlines()[1]
    assert row.split()[:2] == ["quotes-tagger:1", "adapter_model.safetensors"]
    assert f"truncated: 5 of {weights['bytes']} bytes" in row
    (fault,) = json.loads(run("verify", "quotes-tagger:1", "--format", "json").out)
    assert fault["version"] == "quotes-tagger:1"
    refused = run("pull", "quotes-tagger", "out")
    assert refused.code == 1
    assert "adapter_model.safetensors" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "quotes-tager"), "no adapter 'quotes-tager'; the nearest is 'quotes-tagger'"),
        (("pull", "quotes-tagger:9"), "no version 'quotes-tagger:9'; the nearest is 'quotes-tagger:1'"),
        (("versions", "Not A Name"), "'Not A Name' is not an adapter name"),
        (("history", "quotes-tagger"), "names no alias: expected for instance quotes-tagger@production"),
        (("rollback", "quotes-tagger@production"), "no alias 'quotes-tagger@production'"),
        (("promote", "quotes-tagger", "--to", "1"), "'1' is not an alias"),
        (("push", "other"), "no folder for 'other': looked for adapters/other and "),
        (("push", "other", "nowhere"), "'nowhere' is not a folder"),
        (("push", "other", "adapters/quotes-tagger", "--base", "/nope"), "the base '/nope' is not a folder here"),
        (("push", "other", "hf://nonsense"), "is not a Hub reference"),
    ],
)
def test_mistakes_are_one_line(run, trained, arguments, words):
    run("push", "quotes-tagger")
    answer = run(*arguments)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("error: ")
    assert words in answer.err
    assert answer.err.count("\n") == 1


def test_usage_errors_exit_with_2(run):
    assert run("verify", "a:1", "--all").code == 2
    assert run("promote", "a:1").code == 2
    assert run("rollback", "a@b", "--to", "0").code == 2
    assert run("nonsense").code == 2


def test_the_registry_option_goes_before_or_after_the_verb(run, trained, tmp_path):
    for place in (("--registry", tmp_path / "one", "list"), ("list", "--registry", tmp_path / "one")):
        assert f"no adapters yet in {tmp_path / 'one'}" in run(*place).out


def test_data_directories_that_cannot_be_used(run, trained, tmp_path):
    (tmp_path / "file").write_text("x")
    answer = run("--registry", tmp_path / "file", "push", "quotes-tagger")
    assert (answer.code, answer.err) == (1, f"error: the data directory '{tmp_path / 'file'}' is not a folder\n")
    answer = run("--registry", "/proc/nowhere", "push", "quotes-tagger")
    assert answer.code == 1
    assert answer.err.startswith("error: the data directory '/proc/nowhere' cannot be made: ")


def test_the_trainers_folder_in_loraplex_home(run, base, tmp_path):
    Adapter().write(tmp_path / "home" / "adapters" / "at-home", make_receipt(base))
    assert run("push", "at-home").out.startswith("pushed at-home:1")


def test_large_pushes_show_progress(run, trained, monkeypatch):
    monkeypatch.setattr("loraplex_registry.printing.LARGE_BYTES", 100)
    assert "push quotes-tagger" in run("push", "quotes-tagger").err


def test_serve_refuses_what_it_cannot_do(run, tmp_path):
    (tmp_path / "tokens").write_text("# none\n")
    answer = run("--registry", tmp_path / "r", "serve", "--token-file", tmp_path / "tokens")
    assert (answer.code, answer.err) == (1, f"error: the token file '{tmp_path / 'tokens'}' holds no token\n")
    answer = run("--registry", tmp_path / "r", "serve", "--token-file", tmp_path / "no-file")
    assert "cannot be read" in answer.err
    answer = run("--registry", "http://127.0.0.1:1", "serve")
    assert answer.err == "error: serve needs a folder, not http://127.0.0.1:1\n"
