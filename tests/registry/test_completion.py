"""Completion as a shell asks for it: from the registry, quickly, and silently where there is nothing to say."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest
from click.shell_completion import ShellComplete

from loraplex_registry.cli import cli
from loraplex_registry.completion import SHELLS, VARIABLE, script
from loraplex_registry.postgres import PostgresDatabase
from loraplex_registry.registry import Registry

from .conftest import Adapter, run_python, served


def complete(*words: str) -> list[str]:
    *before, begun = words
    found = ShellComplete(cli, {}, "registry", VARIABLE).get_completions([*before], begun)
    return [item.value for item in found]


@pytest.fixture(params=["folder", "url"])
def filled(request, base, tmp_path, monkeypatch):
    """Three names; LORAPLEX_REGISTRY names the registry."""
    with Registry(tmp_path / "registry") as local:
        for seed, name in enumerate(("quotes-tagger", "quotes-tagger", "quotes-headline", "ns/other")):
            local.push(name, Adapter(seed=seed).write(tmp_path / f"a{seed}"), base=base)
        local.promote("quotes-tagger:1", "production")
        local.promote("quotes-tagger:1", "staging")
        local.promote("quotes-headline:1", "preview")
        if request.param == "folder":
            monkeypatch.setenv("LORAPLEX_REGISTRY", str(tmp_path / "registry"))
            yield
            return
        with served(local) as url:
            monkeypatch.setenv("LORAPLEX_REGISTRY", url)
            yield


def test_names_versions_and_aliases(filled):
    assert complete("show", "") == ["ns/other", "quotes-headline", "quotes-tagger"]
    assert complete("show", "quotes-t") == complete("show", "quotes-tagger") == ["quotes-tagger"]
    assert complete("pull", "quotes-tagger:") == ["quotes-tagger:2", "quotes-tagger:1"]
    assert complete("rollback", "quotes-tagger@") == ["quotes-tagger@production", "quotes-tagger@staging"]
    assert complete("alias", "rm", "quotes-tagger@st") == ["quotes-tagger@staging"]
    assert complete("diff", "quotes-tagger:1", "n") == ["ns/other"]
    assert complete("export", "ns/other", "quotes-h") == ["quotes-headline"]
    assert complete("versions", "quotes-") == ["quotes-headline", "quotes-tagger"]
    assert complete("show", "zebra") == complete("show", "zebra@") == complete("show", "zebra:1") == []
    assert complete("restor") == ["restore"]


def test_the_registry_of_the_command_line(filled, tmp_path, monkeypatch):
    where = os.environ["LORAPLEX_REGISTRY"]
    monkeypatch.setenv("LORAPLEX_REGISTRY", str(tmp_path / "none"))
    assert complete("show", "ns") == []
    assert complete("--registry", where, "show", "ns") == complete("show", "--registry", where, "ns") == ["ns/other"]


def test_names_of_a_catalog_in_postgresql(database, cluster, base, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPLEX_REGISTRY", str(tmp_path / "none"))  # blobs and staging; nobody looks there
    with Registry(tmp_path / "registry", database=database) as local:
        for seed in range(2):
            local.push("quotes-tagger", Adapter(seed=seed).write(tmp_path / f"a{seed}"), base=base)
        local.promote("quotes-tagger:1", "production")
    monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", database)
    assert complete("show", "quo") == ["quotes-tagger"]
    assert complete("pull", "quotes-tagger:") == ["quotes-tagger:2", "quotes-tagger:1"]
    assert complete("rollback", "quotes-tagger@") == ["quotes-tagger@production"]
    empty = cluster.make("template0")
    try:
        monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", empty)
        assert complete("show", "quo") == []
        with closing(PostgresDatabase(empty)) as found, found.reading() as db:
            assert db.exec_driver_sql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").scalar() == 0
    finally:
        cluster.drop(empty)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        for url in (f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x", "mysql://x/y"):
            began = time.monotonic()
            monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", url)
            assert complete("show", "quo") == []
            assert time.monotonic() - began < 10
    assert not (tmp_path / "none").exists()


def test_what_goes_wrong_completes_nothing_and_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPLEX_REGISTRY", str(tmp_path / "none"))
    assert complete("show", "a") == []
    assert not (tmp_path / "none").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "catalog.sqlite3").write_bytes(b"no database" * 100)
    assert complete("--registry", str(tmp_path / "broken"), "show", "a") == []
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        began = time.monotonic()
        assert complete("--registry", f"http://127.0.0.1:{silent.getsockname()[1]}", "show", "a") == []
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell):
    assert VARIABLE in script(shell)
    assert f"{shell}_complete" in script(shell)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_within_a_reference(base, tmp_path):
    """The printed script, sourced by a real bash, with a `registry` on the path that runs this code."""
    with Registry(tmp_path / "registry") as local:
        local.push("quotes-tagger", Adapter().write(tmp_path / "a"), base=base)
        local.promote("quotes-tagger:1", "production")
    printed = run_python("from loraplex_registry.cli import main; main()", "completion", "bash", stdout=subprocess.PIPE)
    source, _ = printed.communicate(timeout=60)
    program = tmp_path / "bin" / "registry"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom loraplex_registry.cli import main\nmain()\n")
    program.chmod(0o755)
    ask = """
        COMP_WORDS=(registry show quotes-tagger@p); COMP_CWORD=2; _registry_completion registry
        echo "${COMPREPLY[@]} $COMP_WORDBREAKS"
    """
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LORAPLEX_REGISTRY": str(tmp_path / "registry"),
    }
    answer = subprocess.run(["bash", "-c", source + ask], env=environment, capture_output=True, text=True, timeout=60)
    found, _, breaks = answer.stdout.partition(" ")
    assert (found, answer.stderr) == ("quotes-tagger@production", "")
    assert not {":", "@"} & set(breaks)
