"""`registry delete`, `restore`, `gc` and `db upgrade`: what a registry keeps, and in which schema."""

import os
from pathlib import Path

import click
from rich.filesize import decimal

from .command import REF, OneLine, cli, database_option, opened, seconds, verb
from .database import upgrade_catalog
from .registry import CATALOG, Registry
from .remote import DATABASE


@verb
@click.argument("ref", type=REF, metavar="NAME:VERSION")
@click.option("--reason", default="", help="Why, for the ledger.")
def delete(ref: str, reason: str) -> None:
    """Hide a version: it neither resolves nor is listed. Refused while an alias points to it."""
    with opened() as registry:
        click.echo(f"deleted {registry.delete(ref, reason)}; to bring it back: registry restore {ref}")


@verb
@click.argument("ref", type=REF, metavar="NAME:VERSION")
@click.option("--reason", default="", help="Why, for the ledger.")
def restore(ref: str, reason: str) -> None:
    """Bring a deleted version back."""
    with opened() as registry:
        click.echo(f"restored {registry.restore(ref, reason)}")


@verb
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--grace", "grace_seconds", default="2h", callback=seconds, metavar="TIME", help="Spare what is younger.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Delete all but the newest N versions of each name.")
def gc(dry_run: bool, grace_seconds: int, keep: int | None) -> None:
    """Remove the bytes of versions deleted before the grace, and blobs that no version refers to."""
    with opened() as registry:
        found = registry.gc(grace_seconds, keep, dry_run)
    would = "would be " if dry_run else ""
    for version in found.deleted:
        click.echo(f"{version}: {would}deleted, the newest {keep} are kept")
    for version in found.purged:
        click.echo(f"{version}: {would}purged, it was deleted before the grace")
    click.echo(f"{found.files} files, {decimal(found.bytes)}, {would}removed")


@cli.group()
def db() -> None:
    """Care for the catalog of a registry in a folder."""


@db.command()
@database_option
@click.pass_obj
def upgrade(where: str | None, database: str | None) -> None:
    """Bring the catalog of an older release to this release's schema. Stop what uses the registry first."""
    if where and where.startswith(("http://", "https://")):
        raise OneLine(f"db upgrade needs a folder, not {where}")
    root = Path(where).expanduser() if where else Registry.default_root()
    before, after = upgrade_catalog(root / CATALOG, database or os.environ.get(DATABASE))
    click.echo(f"{root}: schema {before}" + (f" → {after}" if after != before else ", nothing to upgrade"))
