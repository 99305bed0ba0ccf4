"""`registry token …`: makes, lists and revokes tokens. A secret goes to stdout once, and nowhere else."""

from collections.abc import Callable

import click

from .command import cli, opened, output_format, seconds, verb
from .printing import make_table, print_json, print_table
from .tokens import INCLUDES, Token
from .wire import dump


@cli.group()
def token() -> None:
    """Who may do what over HTTP: tokens with scopes."""


def token_verb(function: Callable[..., None]) -> click.Command:
    return verb(function, token)


@token_verb
@click.option("--name", required=True, help="Who holds it: what the ledgers will say.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    metavar="SCOPE",
    help=f"{', '.join(INCLUDES)}; repeatable, or a list with commas.",
)
@click.option("--prefix", default="", metavar="TEXT", help="Only for names that begin so.")
@click.option("--expires", callback=seconds, metavar="TIME", help="For instance 90d; default: never.")
def create(name: str, scopes: tuple[str, ...], prefix: str, expires: int | None) -> None:
    """Make a token, and print its secret, which nobody can find out later."""
    wanted = [scope.strip() for given in scopes for scope in given.split(",")]
    with opened() as registry:
        made = registry.tokens.create(name, wanted, prefix, expires)
    click.echo(
        f"created {made.token}: {_allows(made.token)}{_end(made.token)}; its secret is told only here:", err=True
    )
    click.echo(made.secret)


@token_verb
@output_format
def list_(style: str) -> None:
    """All tokens, also those that were revoked or have expired; never a secret."""
    with opened() as registry:
        tokens = registry.tokens.list()
    if style == "json":
        print_json([dump(Token, token) | {"state": token.state} for token in tokens])
        return
    table = make_table("id", "name", "allows", "state", "expires", "created", "by")
    for one in tokens:
        end = f"{one.expires_at.astimezone():%Y-%m-%d %H:%M}" if one.expires_at else "never"
        created = f"{one.created_at.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(one.id, one.name, _allows(one), one.state, end, created, one.created_by)
    print_table(table)


@token_verb
@click.argument("token_id", metavar="ID")
def revoke(token_id: str) -> None:
    """End a token, at once."""
    with opened() as registry:
        click.echo(f"revoked {registry.tokens.revoke(token_id)}")


def _allows(token: Token) -> str:
    return ", ".join(token.scopes) + (f" of {token.prefix}…" if token.prefix else "")


def _end(token: Token) -> str:
    return f", until {token.expires_at.astimezone():%Y-%m-%d %H:%M}" if token.expires_at else ""
