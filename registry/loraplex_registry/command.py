"""The `registry` command's root: which registry is meant, errors in one line, and options that many verbs take.

Knows no verb: each hangs itself on `cli`, in a file of its group.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .completion import ReferenceType
from .errors import RateLimited, RegistryError
from .patience import Patience
from .registry import Registry
from .remote import RemoteRegistry, open_registry


class OneLine(click.ClickException):
    """A user's mistake: one line on stderr, exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


class Group(click.Group):
    """Turns the registry's errors into one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (RegistryError, OSError) as error:
            raise OneLine(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--registry", metavar="DIR_OR_URL", envvar="LORAPLEX_REGISTRY", help="Default: the user's data folder.")
@click.pass_context
def cli(ctx: click.Context, registry: str | None) -> None:
    """Keep adapters: push, version, promote, roll back, pull and verify them."""
    ctx.obj = registry


def verb(function: Callable[..., None], group: click.Group | None = None) -> click.Command:
    """A sub-command that also takes --registry after its name, and finds the answer in the context."""

    def note(ctx: click.Context, _option: click.Parameter, value: str | None) -> None:
        ctx.obj = value or ctx.obj

    where = click.option(
        "--registry", metavar="DIR_OR_URL", expose_value=False, callback=note, help="A folder or a URL."
    )
    return (group or cli).command(function.__name__.strip("_"))(where(function))


database_option = click.option(
    "--database", metavar="URL", help="postgresql://…, the catalog's; also LORAPLEX_REGISTRY_DATABASE."
)
REF, NAME = ReferenceType(), ReferenceType(bare=True)
signed_by = click.option(
    "--signed-by",
    "key_files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PUBFILE",
    help="Only if this key has signed it; of several, one has to.",
)
output_format = click.option("--format", "style", type=click.Choice(["table", "json"]), default="table")
most = click.option("--limit", type=click.IntRange(1), metavar="N", help="The most that are shown; default: all.")


@contextmanager
def opened() -> Iterator[Registry | RemoteRegistry]:
    def told(error: RateLimited) -> None:
        click.echo(f"more than {error.limit} requests; waiting {error.retry_after_seconds} s", err=True)

    with open_registry(click.get_current_context().obj, patience=Patience(told=told)) as registry:
        yield registry


def seconds(_ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9})([smhd])", value)
    if not found:
        raise click.BadParameter(f"'{value}', expected a number and s, m, h or d, for instance 2h", param=option)
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
