"""The `registry` command, assembled: every verb on a folder or a URL. A file for each group of verbs owns its words."""

# ruff: noqa: F401 - a group that is imported has hung its verbs on `cli`

import click

from . import (
    alias_commands,
    care_commands,
    copy_commands,
    hub_commands,
    list_commands,
    login_commands,
    protect_commands,
    push_commands,
    serve_commands,
    show_commands,
    sign_commands,
    tag_commands,
    token_commands,
)
from .command import cli
from .completion import SHELLS, script


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what teaches a shell to complete verbs, options, names, versions and aliases."""
    click.echo(script(shell))


def main() -> None:
    """The console script."""
    cli(prog_name="registry")
