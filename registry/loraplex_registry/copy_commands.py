"""`registry pull`, `verify`, `export` and `import`: a version's bytes, proven, out of a registry and into one."""

import sys
from pathlib import Path

import click
from rich.filesize import decimal

from .archive import export_versions, import_versions
from .command import REF, opened, output_format, signed_by, verb
from .printing import make_table, print_json, print_table, transfer
from .reference import Reference
from .signing import PublicKey, check_signed
from .version import Fault
from .wire import dump


@verb
@click.argument("ref", type=REF)
@click.argument("folder", metavar="[DIR]", required=False)
@signed_by
def pull(ref: str, folder: str | None, key_files: tuple[Path, ...]) -> None:
    """Write a version's files, proven by their sha256, to DIR (default: ./NAME)."""
    keys = [PublicKey.read(file) for file in key_files]
    with opened() as registry:
        dest = Path(folder or Reference.parse(ref).name)
        version = registry.pull(ref, dest, signed_by=keys)
    click.echo(f"pulled {version} to {dest} {version.digest}")


@verb
@click.argument("ref", type=REF, required=False)
@click.option("--all", "everything", is_flag=True, help="Every version; the default without REF.")
@signed_by
@output_format
def verify(ref: str | None, everything: bool, key_files: tuple[Path, ...], style: str) -> None:
    """Hash every file of REF, or of all versions. Exit code 1 when one is missing, truncated or altered.

    With --signed-by, REF must also be signed by one of the keys.
    """
    if key_files and not ref:
        raise click.UsageError("--signed-by goes with a REF")
    keys = [PublicKey.read(file) for file in key_files]
    if ref and everything:
        raise click.UsageError("give REF or --all, not both")
    with opened() as registry:
        if keys and ref:
            version = registry.resolve(ref)
            check_signed(str(version), version.digest, registry.signatures.of(version.digest), keys)
            ref = str(version)  # what was signed is what is hashed, wherever an alias goes meanwhile
        faults = registry.verify(ref)
    if style == "json":
        print_json(dump(list[Fault], faults))
    elif not faults:
        signed = " and signed as wanted" if keys else ""
        click.echo(f"{ref or 'all versions'}: every file is what its digest says{signed}")
    else:
        table = make_table("version", "file", "fault")
        for fault in faults:
            table.add_row(fault.version, fault.path, fault.what)
        print_table(table)
    if faults:
        sys.exit(1)


@verb
@click.argument("refs", type=REF, nargs=-1, required=True, metavar="REF...")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="A new file.")
def export(refs: tuple[str, ...], output: Path) -> None:
    """Write versions to one file, for `registry import` elsewhere."""
    with opened() as registry, transfer("export", sum(registry.resolve(ref).bytes for ref in refs)) as progress:
        versions = export_versions(registry, refs, output, progress)
    click.echo(f"exported {', '.join(map(str, versions))} to {output} ({decimal(output.stat().st_size)})")


@verb
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--as", "name", metavar="NAME", help="Keep them under another name.")
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the adapters say.")
def import_(file: Path, name: str | None, base: str | None) -> None:
    """Push the versions of a file that `registry export` wrote; each keeps its digest and gets the next number."""
    with opened() as registry, transfer("import", file.stat().st_size) as progress:
        for version in import_versions(registry, file, name=name, base=base, progress=progress):
            how = "imported" if version.pushed else "restored" if version.restored else "already"
            click.echo(f"{how} {version} {version.digest}")
