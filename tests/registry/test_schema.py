"""Catalogs of other releases: the first is upgraded, a newer is refused, a new one is like an upgraded one."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from click.testing import CliRunner

from loraplex_registry.cli import cli
from loraplex_registry.errors import StoreUnavailable
from loraplex_registry.registry import Registry
from loraplex_registry.schema import MIGRATIONS, SCHEMA_VERSION
from loraplex_registry.tables import METADATA

# What release 0.1.0 made, statement for statement.
SCHEMA_1 = """
CREATE TABLE versions (
    name TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL, base_id TEXT NOT NULL, base_revision TEXT,
    base_fingerprint TEXT, base_quantization TEXT, rank INTEGER NOT NULL, targets JSON NOT NULL, bytes INTEGER NOT NULL,
    metrics JSON NOT NULL, parent TEXT, created_at TEXT NOT NULL, created_by TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (name, number), UNIQUE (name, digest)
);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE TABLE alias_moves (
    id INTEGER NOT NULL, name TEXT NOT NULL, alias TEXT NOT NULL, from_number INTEGER, to_number INTEGER NOT NULL,
    who TEXT NOT NULL, at TEXT NOT NULL, reason TEXT NOT NULL, action TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX alias_moves_by_alias ON alias_moves (name, alias, id);
CREATE TABLE aliases (
    name TEXT NOT NULL, alias TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (name, alias), FOREIGN KEY(name, number) REFERENCES versions (name, number)
);
CREATE TRIGGER alias_moves_no_update BEFORE update ON alias_moves
BEGIN SELECT RAISE(ABORT, 'the alias ledger is append-only'); END;
CREATE TRIGGER alias_moves_no_delete BEFORE delete ON alias_moves
BEGIN SELECT RAISE(ABORT, 'the alias ledger is append-only'); END;
PRAGMA user_version=1;
"""
TABLES = {
    "versions": "name, number, digest, base_id, base_revision, base_fingerprint, base_quantization, rank, targets, "
    "bytes, metrics, parent, created_at, created_by, message",
    "alias_moves": "id, name, alias, from_number, to_number, who, at, reason, action",
    "aliases": "name, alias, number",
}


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def first_release(push, registry, tmp_path) -> Path:
    """A folder as release 0.1.0 left it: two versions, production moved twice."""
    push(message="first"), push(seed=1)
    registry.promote("quotes-tagger:1", "production", "it works")
    registry.promote("quotes-tagger:2", "production")
    old = tmp_path / "old"
    shutil.copytree(registry.store.place.blobs, old / "blobs" / "sha256")
    with (
        closing(sqlite3.connect(old / "catalog.sqlite3")) as db,
        closing(sqlite3.connect(registry.root / "catalog.sqlite3")) as filled,
    ):
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(SCHEMA_1)
        for table, columns in TABLES.items():
            rows = filled.execute(f"SELECT {columns} FROM {table}").fetchall()
            db.executemany(f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.commit()
    return old


def upgrade(root):
    return CliRunner().invoke(cli, ["--registry", str(root), "db", "upgrade"])


def shape(file) -> dict[str, object]:
    """All that a schema is: columns, keys, indexes, foreign keys, triggers, and its number."""
    with closing(sqlite3.connect(file)) as db:
        # alembic_version is Alembic's own mark, made when it first runs.
        named = "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'alembic_version'"
        tables = [name for (name,) in db.execute(named)]
        found: dict[str, object] = {"version": db.execute("PRAGMA user_version").fetchone()}
        found["triggers"] = {
            " ".join(sql.split()) for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'")
        }
        for table in tables:
            for about in ("table_info", "foreign_key_list"):
                found[f"{table} {about}"] = sorted(row[1:] for row in db.execute(f"PRAGMA {about}({table})"))
            indexes = db.execute(f"PRAGMA index_list({table})").fetchall()
            found[f"{table} indexes"] = sorted(
                (unique, db.execute(f"PRAGMA index_info({name})").fetchall()) for _, name, unique, *_ in indexes
            )
    return found


def test_the_first_release_is_upgraded(first_release, registry):
    with pytest.raises(StoreUnavailable, match=f"schema version 1, .*run `registry --registry {first_release} db upgr"):
        Registry(first_release)
    answer = upgrade(first_release)
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert answer.stdout == f"{first_release}: schema 1 → {SCHEMA_VERSION}\n"
    with Registry(first_release) as upgraded:
        assert upgraded.versions("quotes-tagger") == registry.versions("quotes-tagger")
        assert upgraded.history("quotes-tagger", "production") == registry.history("quotes-tagger", "production")
        assert upgraded.resolve("quotes-tagger").number == 2
        assert upgraded.verify() == []
        assert upgraded.rollback("quotes-tagger@production").to_number == 1
        assert upgraded.delete("quotes-tagger:2").number == 2
    assert upgrade(first_release).stdout == f"{first_release}: schema {SCHEMA_VERSION}, nothing to upgrade\n"


def test_an_upgraded_catalog_has_the_schema_of_a_new_one(first_release, registry):
    upgrade(first_release)
    after, new = shape(first_release / "catalog.sqlite3"), shape(registry.root / "catalog.sqlite3")
    assert after == new


def test_an_upgrade_that_fails_changes_nothing(first_release):
    """A table of the next schema's name is in the way of its second statement: the first is undone as well."""
    with closing(sqlite3.connect(first_release / "catalog.sqlite3")) as db:
        db.execute("CREATE TABLE deletions (x)")
    before = shape(first_release / "catalog.sqlite3")
    answer = upgrade(first_release)
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr.startswith(
        f"error: the catalog '{first_release / 'catalog.sqlite3'}' cannot be used: table del"
    )
    assert shape(first_release / "catalog.sqlite3") == before


def test_the_migrations_make_the_tables_that_the_catalog_uses(registry):
    engine = sa.create_engine(f"sqlite:///{registry.root / 'catalog.sqlite3'}")
    with engine.connect() as db:
        options = {"include_name": lambda name, kind, _: (kind, name) != ("table", "alembic_version")}
        assert compare_metadata(MigrationContext.configure(db, opts=options), METADATA) == []
    engine.dispose()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [f"{SCHEMA_VERSION:04}"]


def test_what_cannot_be_upgraded_is_left_as_it_is(registry, tmp_path):
    file = registry.root / "catalog.sqlite3"
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreUnavailable, match=r"schema version 99.*a newer loraplex made it"):
        Registry(registry.root)
    answer = upgrade(registry.root)
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert "has schema version 99, this loraplex reads" in answer.stderr
    answer = upgrade(tmp_path / "nothing")
    assert answer.stderr == f"error: there is no registry in '{tmp_path / 'nothing'}': it has no catalog.sqlite3\n"
    assert not (tmp_path / "nothing").exists()
    answer = upgrade("http://127.0.0.1:1")
    assert answer.stderr == "error: db upgrade needs a folder, not http://127.0.0.1:1\n"
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        db.execute("CREATE TABLE other (x)")
    with pytest.raises(StoreUnavailable, match="is not the catalog of a registry"):
        Registry(tmp_path)
