"""`registry login`, `logout` and `whoami`: which token is used for a registry's URL. A token is never printed."""

import os
import sys

import click

from .command import OneLine, opened, output_format, verb
from .credentials import VARIABLE, check_secret, forget_token, keep_token
from .printing import print_json
from .remote import RemoteRegistry
from .tokens import Identity
from .wire import dump


@verb
@click.argument("url", required=False)
@click.option(
    "--token", "given", metavar="TOKEN", help="- reads it from stdin; default: asks for it. `ps` shows arguments."
)
def login(url: str | None, given: str | None) -> None:
    """Keep a token for the registry at URL, once the server has said that it knows it."""
    url = _url(url)
    typed = click.prompt("Token", hide_input=True, err=True) if given is None else given
    secret = check_secret((sys.stdin.readline() if typed == "-" else typed).strip(), "what was given")
    with RemoteRegistry(url, secret) as registry:
        identity = registry.whoami()
    keep_token(url, secret)
    click.echo(f"logged in to {url} as {_said(identity)}")
    if os.environ.get(VARIABLE):
        click.echo(f"warning: {VARIABLE} is set, and is used instead", err=True)


@verb
@click.argument("url", required=False)
def logout(url: str | None) -> None:
    """Forget the token that was kept for the registry at URL; the registry still knows it."""
    url = _url(url)
    click.echo(f"logged out of {url}" if forget_token(url) else f"there was no token for {url}")


@verb
@output_format
def whoami(style: str) -> None:
    """Whose token is used, and what it allows."""
    with opened() as registry:
        identity = registry.whoami()
    if style == "json":
        print_json(dump(Identity, identity))
    else:
        click.echo(_said(identity))


def _url(given: str | None) -> str:
    where = given or click.get_current_context().obj
    if not where or not where.startswith(("http://", "https://")):
        raise OneLine(f"login is for a registry's URL, not {where or 'the default folder'}; give URL")
    return where.rstrip("/")


def _said(identity: Identity) -> str:
    names = f" of {identity.prefix}…" if identity.prefix else ""
    until = f", until {identity.expires_at.astimezone():%Y-%m-%d %H:%M}" if identity.expires_at else ""
    return f"{identity.name}: {', '.join(identity.scopes)}{names}{until}"
