"""`registry key create` and `registry sign`. A private key is read here, where its owner is, and sent nowhere."""

from pathlib import Path

import click

from .command import cli, opened, verb
from .signing import PublicKey, create_key
from .signing import sign as make_signature


@cli.group()
def key() -> None:
    """Keys that sign versions."""


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
def create(file: Path) -> None:
    """Write a new private key to FILE and its public half to FILE.pub."""
    made = create_key(file)
    click.echo(f"created {made.id}: sign with {file}, which is secret; verify with {file}.pub")


@verb
@click.argument("ref")
@click.option("--key", "file", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The private key.")
def sign(ref: str, file: Path) -> None:
    """Sign the version that REF stands for now."""
    with opened() as registry:
        version = registry.resolve(ref)
        registry.manifest(version.digest)  # proven: what is signed is there, and is what its digest says
        public, signature = make_signature(version.digest, file)
        registry.signatures.add(version.digest, public, signature)
    click.echo(f"signed {version} {version.digest} by {PublicKey(public).id}")
