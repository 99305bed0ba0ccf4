"""`registry tag add` and `tag rm`: the one thing of a version that changes."""

import click

from .command import REF, cli, opened
from .version import Version


@cli.group("tag")
def tag_group() -> None:
    """Put tags on versions, for `registry search tag:…`, and take them off."""


@tag_group.command("add")
@click.argument("ref", type=REF)
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
def add_tags(ref: str, tags: tuple[str, ...]) -> None:
    """Put tags on a version."""
    with opened() as registry:
        _say_tags(registry.tag(ref, add=tags))


@tag_group.command("rm")
@click.argument("ref", type=REF)
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
def remove_tags(ref: str, tags: tuple[str, ...]) -> None:
    """Take tags off a version."""
    with opened() as registry:
        _say_tags(registry.tag(ref, remove=tags))


def _say_tags(version: Version) -> None:
    click.echo(f"{version}: {', '.join(version.tags) or 'no tags'}")
