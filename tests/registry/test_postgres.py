"""What only a registry on PostgreSQL shows: many processes on one database, lost connections, its schema, its errors.

That it is a registry like any other, test_contract and test_gc show.
"""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Thread

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from click.testing import CliRunner

from loraplex_registry.cli import cli
from loraplex_registry.errors import InvalidRequest, NotFound, RegistryError, StoreUnavailable
from loraplex_registry.manifest import BaseRef
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry, open_registry
from loraplex_registry.schema import MIGRATIONS, SCHEMA_VERSION
from loraplex_registry.version import Version

from .conftest import PUSHER, Adapter, make_receipt, run_python, served


@pytest.fixture
def registry(database, tmp_path):
    with Registry(tmp_path / "registry", database=database) as registry:
        yield registry


@pytest.fixture
def other(database, tmp_path):
    """The same registry, opened once more: another process, or another machine that mounts the store."""
    with Registry(tmp_path / "registry", database=database) as registry:
        yield registry


@pytest.fixture
def empty(cluster):
    """The URL of a database with nothing in it."""
    url = cluster.make()
    yield url
    cluster.drop(url)


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


# --- many at once, and sudden ends ---


def test_fifty_pushes_by_ten_processes_get_numbers_without_gaps(empty, base, tmp_path, monkeypatch):
    """They open a database that is empty, so that they make its schema at once as well."""
    monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", empty)
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}") for seed in range(50)]
    pushers = [
        run_python(PUSHER, tmp_path / "registry", base, *folders[i::10], folders[0], stdout=-1, stderr=-1)
        for i in range(10)
    ]
    for pusher in pushers:
        _, errors = pusher.communicate(timeout=120)
        assert pusher.returncode == 0, errors
    with open_registry(tmp_path / "registry") as registry:
        assert [version.number for version in registry.versions("quotes-tagger")] == list(range(1, 51))
        assert registry.verify() == []
    assert not (tmp_path / "registry" / "catalog.sqlite3").exists()


def test_killed_at_any_moment(database, base, tmp_path, monkeypatch):
    """Processes that push without end, killed after random times, share one registry: it verifies clean after each."""
    monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", database)
    folders = [Adapter(seed=seed).write(tmp_path / f"a{seed}") for seed in range(25)]
    for round_ in range(4):
        process = run_python(PUSHER, tmp_path / "registry", base, *folders[round_ * 5 :], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it is pushing by now
        time.sleep(0.004 * round_)
        process.kill()
        process.communicate()
        with open_registry(tmp_path / "registry") as registry:
            assert registry.verify() == []
            numbers = [version.number for version in registry.versions("quotes-tagger")]
            assert numbers == list(range(1, len(numbers) + 1))


def test_twenty_promotions_at_once_are_seen_by_a_watch_in_order_and_none_is_lost(push, registry, other):
    for seed in range(4):
        push(seed=seed)
    seen = []
    with other.watch() as moves:

        def move(i: int) -> None:
            (registry, other)[i % 2].promote(f"quotes-tagger:{i % 4 + 1}", f"alias-{i}")

        with ThreadPoolExecutor(20) as pool:
            done = pool.map(move, range(20))
            seen = [next(moves) for _ in range(20)]
            list(done)
    assert [move.id for move in seen] == sorted(move.id for move in seen)
    assert {move.alias for move in seen} == {f"alias-{i}" for i in range(20)}


def test_a_move_is_not_seen_before_one_that_took_its_row_earlier(push, registry, other):
    """Else a watch that saw the later row would go on from there, and never tell of the earlier one."""
    push()
    with registry.catalog._write() as db:
        registry.catalog._move(db, "quotes-tagger", "slow", 1, "ada", "", "promote")
        later = Thread(target=other.promote, args=("quotes-tagger:1", "fast"))
        later.start()
        later.join(0.5)
        assert later.is_alive()
        assert other.catalog.last_move() == 0
    later.join()
    assert [move.alias for move in other.catalog.moves(0, None, None, 10)] == ["slow", "fast"]


def test_gc_waits_for_who_publishes_elsewhere(push, registry, other):
    push()
    with registry.catalog.publishing():
        collector = Thread(target=other.gc, kwargs={"grace_seconds": 0})
        collector.start()
        collector.join(0.5)
        assert collector.is_alive()
    collector.join(10)
    assert not collector.is_alive()


def test_gc_gets_its_connections_however_many_wait_for_it(push, registry):
    """Forty pushes of one process, which gc keeps waiting, do not keep from it what it needs to end."""
    push()

    def publish(_) -> None:
        with registry.catalog.publishing():
            pass

    with ThreadPoolExecutor(40) as pool:
        with registry.catalog.collecting():
            waiting = [pool.submit(publish, i) for i in range(40)]
            time.sleep(0.5)
            started = time.monotonic()
            with registry.catalog.forgetting(0, None, "ada", True) as (_, _, held):
                assert held == {registry.resolve("quotes-tagger").digest}
            assert time.monotonic() - started < 5
            assert not any(one.done() for one in waiting)
        for one in waiting:
            one.result(10)


def test_who_lost_the_lock_while_it_published_writes_no_row(push, registry, other, base, tmp_path, monkeypatch):
    """gc may have removed its blobs since. The push is repeated, and whole then."""
    push()
    real = registry.store.publish

    def cut_off(*arguments) -> None:
        with other.catalog._read() as db:
            db.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database ="
                    "(SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            )
        assert other.gc(grace_seconds=0)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "publish", cut_off)
        with pytest.raises(StoreUnavailable, match=r"the catalog postgresql://.* cannot be used"):
            push(seed=1)
    assert [str(version) for version in registry.list()] == ["quotes-tagger:1"]
    assert push(seed=1).number == 2
    assert registry.verify() == []


def test_a_server_that_restarts_is_found_again(push, registry, cluster):
    """One clear error while it is away, and the next request is answered; a watch waits, and loses no move."""
    push()
    told: list[RegistryError] = []
    with registry.watch(cut=told.append) as moves, served(registry) as url, RemoteRegistry(url) as remote:
        cluster.control("-m", "fast", "stop")
        try:
            for one in (registry, remote):
                with pytest.raises(
                    StoreUnavailable, match=r"the catalog postgresql://postgres@127\.0\.0\.1:\d+/"
                ) as it:
                    one.resolve("quotes-tagger")
                assert cluster.password not in str(it.value)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(next, moves)
                while not told:
                    time.sleep(0.01)
                cluster.start()
                move = registry.promote("quotes-tagger:1", "production")
                assert waiting.result(20) == move
        finally:
            if not told:
                cluster.start()
        assert remote.resolve("quotes-tagger").number == 1
    assert len(told) == 1


def test_lost_connections_are_replaced_unseen(push, registry, other, database):
    push()
    registry.list()
    execute(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid != pg_backend_pid()",
    )
    assert registry.resolve("quotes-tagger").number == 1
    assert other.promote("quotes-tagger:1", "production").moved


# --- the schema ---


def test_the_ledgers_cannot_be_rewritten(push, registry, database):
    push(), push(seed=1)
    registry.promote("quotes-tagger:1", "production")
    registry.delete("quotes-tagger:2")
    for table in ("alias_moves", "deletions"):
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET who = 'eve'", f"TRUNCATE {table}"):
            with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="append-only"):
                execute(database, statement)


def test_an_older_schema_is_upgraded_by_command_alone(empty, tmp_path, monkeypatch):
    engine = sa.create_engine(empty.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as db:
        config = Config(attributes={"connection": db})
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        command.upgrade(config, "0001")
    engine.dispose()
    with pytest.raises(StoreUnavailable, match=r"has schema version 1, .*: run `registry db upgrade` with"):
        Registry(tmp_path / "registry", database=empty)
    root = str(tmp_path / "registry")
    answer = CliRunner().invoke(cli, ["--registry", root, "db", "upgrade", "--database", empty])
    assert (answer.exit_code, answer.stdout) == (0, f"{root}: schema 1 → {SCHEMA_VERSION}\n")
    monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", empty)
    answer = CliRunner().invoke(cli, ["--registry", root, "db", "upgrade"])
    assert answer.stdout == f"{root}: schema {SCHEMA_VERSION}, nothing to upgrade\n"
    with open_registry(root) as registry:
        assert registry.list() == []
        with pytest.raises(NotFound):
            registry.delete("x:1")


def test_a_schema_that_is_not_ours_is_left_alone(empty, tmp_path):
    execute(empty, "CREATE TABLE alembic_version (version_num text)", "INSERT INTO alembic_version VALUES ('9999')")
    with pytest.raises(StoreUnavailable, match=r"has schema version 9999.*a newer loraplex made it"):
        Registry(tmp_path / "registry", database=empty)
    execute(empty, "UPDATE alembic_version SET version_num = '728d730b5ebd'")
    with pytest.raises(StoreUnavailable, match="holds the tables of another program"):
        Registry(tmp_path / "registry", database=empty)
    execute(empty, "DROP TABLE alembic_version", "CREATE TABLE deletions (x int)")
    with pytest.raises(StoreUnavailable, match='relation "deletions" already exists'):
        Registry(tmp_path / "registry", database=empty)
    with psycopg.connect(empty) as db:  # nothing of ours was left
        tables = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert tables == [("deletions",)]


def test_the_upgrade_command_makes_the_schema_of_an_empty_database(empty, tmp_path):
    """It runs before the registry's first start on Kubernetes, when nobody has opened the database yet."""
    command = ["--registry", str(tmp_path), "db", "upgrade", "--database", empty]
    for told in (f"schema 0 → {SCHEMA_VERSION}", f"schema {SCHEMA_VERSION}, nothing to upgrade"):
        answer = CliRunner().invoke(cli, command)
        assert (answer.exit_code, answer.stdout) == (0, f"{tmp_path}: {told}\n")
    with Registry(tmp_path / "registry", database=empty) as registry:
        assert registry.list() == []
    execute(empty, "UPDATE alembic_version SET version_num = '9999'")
    answer = CliRunner().invoke(cli, command)
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert "has schema version 9999" in answer.stderr


def test_names_are_ordered_and_sizes_kept_as_in_sqlite(registry):
    """The test's database orders words by English rules, in which punctuation hardly counts."""
    names = ["a-z", "a.b", "aa", "a/b", "a_c", "b", "a0"]
    for name in names:
        draft = Version(
            name, 0, f"sha256:{0:064}", BaseRef("tiny"), 4, ("q",), 8 << 30, {}, None, datetime.now(UTC), "ada", ""
        )
        with registry.catalog.publishing() as add:
            add(draft)
    assert [version.name for version in registry.list()] == sorted(names)
    assert {version.bytes for version in registry.search(sort="name")} == {8 << 30}


# --- what is wrong with the URL ---


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "mysql://ada:hunter2@host/db",
            "the database's URL begins with mysql://, expected postgresql://user@host/name",
        ),
        ("ada:hunter2@host/db", "the database's URL is none, expected postgresql://user@host/name"),
        ("postgresql://ada:hun:ter2@ho:st/x:hunter2", "the database's URL cannot be read"),
        ("postgresql://ada:hunter2@127.0.0.1:1/db", "the catalog postgresql://ada@127.0.0.1:1/db cannot be used: "),
        ("postgresql://ada@127.0.0.1:1/db?password=hunter2", "the catalog postgresql://ada@127.0.0.1:1/db cannot be"),
        ("postgresql://ada:hunter2@127.0.0.1:1/db?hunter2=x", "the catalog postgresql://ada@127.0.0.1:1/db cannot be"),
    ],
)
def test_an_error_names_the_database_and_never_the_password(tmp_path, monkeypatch, url, said):
    monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", url)
    answer = CliRunner().invoke(cli, ["--registry", str(tmp_path), "list"])
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: ")
    assert said in answer.stderr
    assert "hunter2" not in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_wrong_password_is_not_repeated(cluster, tmp_path):
    url = cluster.url().replace(cluster.password, "hunter2")
    with pytest.raises(StoreUnavailable, match='password authentication failed for user "postgres"') as caught:
        Registry(tmp_path, database=url)
    assert "hunter2" not in str(caught.value)


def test_without_the_driver_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreUnavailable, match=r"pip install 'loraplex\[postgres\]'"):
        Registry(tmp_path, database="postgresql://ada@host/db")


def test_text_that_postgres_does_not_keep_is_the_askers_mistake(push, registry):
    with pytest.raises(InvalidRequest, match="cannot contain NUL"):
        push(message="a\0b")
    assert push(message="ab").number == 1


# --- the command ---


def test_the_command_serves_from_a_database(database, base, tmp_path):
    """Two servers, as on two machines: what one takes the other gives. The password is in neither's output."""
    folder = Adapter().write(tmp_path / "adapter", make_receipt(base))
    servers, urls = [], []
    try:
        for _ in range(2):
            words = ("--registry", tmp_path / "registry", "serve", "--port", "0", "--database", database)
            code = "from loraplex_registry.cli import main; main()"
            servers.append(run_python(code, *words, stderr=subprocess.PIPE))
            line = servers[-1].stderr.readline()
            at = f"postgresql://postgres@{database.partition('@')[2]}"
            assert line.startswith(f"registry {tmp_path / 'registry'}, {at} at http://127.0.0.1:")
            urls.append(line.split()[-1])
        with RemoteRegistry(urls[0]) as one, RemoteRegistry(urls[1]) as two, two.watch() as moves:
            version = one.push("quotes-tagger", folder, base=base)
            one.promote("quotes-tagger:1", "production")
            assert next(moves).to_number == 1
            assert two.pull("quotes-tagger@production", tmp_path / "out").digest == version.digest
        answer = CliRunner().invoke(
            cli,
            ["--registry", str(tmp_path / "registry"), "list", "--format", "json"],
            env={"LORAPLEX_REGISTRY_DATABASE": database},
        )
        assert [one["name"] for one in json.loads(answer.stdout)] == ["quotes-tagger"]
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=20)
            assert database.partition("@")[0].rpartition(":")[2] not in errors
