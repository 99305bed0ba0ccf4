"""`registry alias protect`, `alias unprotect`, `alias rules` and `approve`: what an alias asks of a version."""

from collections.abc import Callable
from pathlib import Path

import click

from .alias_commands import alias
from .command import opened, output_format, verb
from .printing import make_table, print_json, print_table
from .protections import Rule
from .reference import parse_alias
from .signing import PublicKey
from .wire import dump


def alias_verb(function: Callable[..., None]) -> click.Command:
    return verb(function, alias)


@alias_verb
@click.argument("ref", metavar="NAME@ALIAS")
@click.option("--require", multiple=True, metavar="COMPARISON", help="What must hold, as 'f1>=0.9'. Repeatable: all.")
@click.option(
    "--signed-by",
    "key_files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PUBFILE",
    help="Whose signature it must have. Repeatable: one of them.",
)
@click.option("--approver", "approvers", multiple=True, metavar="WHO", help="Who must approve. Repeatable: one.")
def protect(ref: str, require: tuple[str, ...], key_files: tuple[Path, ...], approvers: tuple[str, ...]) -> None:
    """Let the alias move only to versions that meet a rule, which takes the place of the one before."""
    keys = [PublicKey.read(file).text for file in key_files]
    with opened() as registry:
        click.echo(f"protected {ref}: {registry.protections.protect(*parse_alias(ref), require, keys, approvers)}")


@alias_verb
@click.argument("ref", metavar="NAME@ALIAS")
def unprotect(ref: str) -> None:
    """Take an alias's rule away."""
    with opened() as registry:
        click.echo(f"unprotected {ref}, which asked: {registry.protections.unprotect(*parse_alias(ref))}")


@alias_verb
@output_format
def rules(style: str) -> None:
    """All rules, and who made them when."""
    with opened() as registry:
        found = registry.protections.list()
    if style == "json":
        print_json(dump(list[Rule], found))
        return
    table = make_table("alias", "asks", "since", "by")
    for rule in found:
        table.add_row(f"{rule.name}@{rule.alias}", str(rule), f"{rule.at.astimezone():%Y-%m-%d %H:%M}", rule.who)
    print_table(table)


@verb
@click.argument("ref")
@click.option("--for", "alias_name", required=True, metavar="ALIAS", help="The alias that it may move to.")
def approve(ref: str, alias_name: str) -> None:
    """Say yes to a version that somebody else pushed, for an alias that asks for it."""
    with opened() as registry:
        click.echo(f"approved {(made := registry.protections.approve(ref, alias_name))} for {alias_name} as {made.who}")
