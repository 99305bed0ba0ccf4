"""`registry promote`, `rollback`, `alias set|rm|history`, `history` and `watch`: where aliases point, and pointed."""

import json
from contextlib import suppress

import click

from .command import REF, cli, opened, output_format, verb
from .errors import RegistryError
from .printing import make_table, move_line, plain, print_json, print_table, say_move, where_is
from .reference import parse_alias


@verb
@click.argument("ref", type=REF)
@click.option("--to", "alias", required=True, metavar="ALIAS", help="The alias to move, for instance production.")
@click.option("--reason", default="", help="Why, for the ledger.")
@click.option("--require", multiple=True, metavar="COMPARISON", help="What must hold, as 'f1>=0.9'. Repeatable.")
def promote(ref: str, alias: str, reason: str, require: tuple[str, ...]) -> None:
    """Point an alias at a version."""
    with opened() as registry:
        say_move(registry.promote(ref, alias, reason, require=require))


@verb
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@click.option("--to", "number", type=click.IntRange(1), metavar="VERSION", help="Default: the previous target.")
@click.option("--reason", default="", help="Why, for the ledger.")
def rollback(ref: str, number: int | None, reason: str) -> None:
    """Point an alias back at its previous target, or at a given version."""
    with opened() as registry:
        say_move(registry.rollback(ref, number, reason))


@cli.group()
def alias() -> None:
    """Set and remove aliases, and tell where they pointed."""


@alias.command("set")
@click.argument("ref", type=REF)
@click.argument("name", metavar="ALIAS")
@click.option("--reason", default="", help="Why, for the ledger.")
def set_alias(ref: str, name: str, reason: str) -> None:
    """Point ALIAS at a version: `registry promote` without requirements."""
    with opened() as registry:
        say_move(registry.promote(ref, name, reason))


@alias.command("rm")
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@click.option("--reason", default="", help="Why, for the ledger.")
def remove_alias(ref: str, reason: str) -> None:
    """Remove an alias. Without `production`, a bare NAME means the newest version."""
    with opened() as registry:
        say_move(registry.remove_alias(ref, reason))


@verb
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@output_format
def history(ref: str, style: str) -> None:
    """Every move of an alias, newest first."""
    with opened() as registry:
        moves = registry.history(*parse_alias(ref))[::-1]
    if style == "json":
        print_json([plain(move) for move in moves])
        return
    table = make_table("when", "from", "to", "how", "who", "reason")
    for move in moves:
        at = move.at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(at, str(move.from_number or ""), str(move.to_number or ""), move.action, move.who, move.reason)
    print_table(table)


@alias.command("history")
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@output_format
@click.pass_context
def alias_history(ctx: click.Context, ref: str, style: str) -> None:
    """Every move of an alias, newest first: `registry history`."""
    ctx.invoke(history, ref=ref, style=style)


@verb
@click.argument("ref", type=REF, metavar="[NAME[@ALIAS]]", required=False)
@click.option("--after", type=click.IntRange(0), metavar="ID", help="From the ledger's row ID on; default: from now.")
@output_format
def watch(ref: str | None, after: int | None, style: str) -> None:
    """Print the moves of all aliases, of NAME's or of one, as they are made, until Ctrl-C."""

    def cut(error: RegistryError) -> None:
        click.echo(f"{error}; trying again", err=True)

    with opened() as registry, suppress(KeyboardInterrupt), registry.watch(ref, after, cut) as moves:
        click.echo(f"watching {ref or 'all aliases'} in {where_is(registry)}", err=True)
        for move in moves:
            click.echo(json.dumps(plain(move), ensure_ascii=False) if style == "json" else move_line(move))
