"""What the command says of versions and moves: words, tables, JSON, and progress bars. Asks no registry."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from .registry import Registry
from .remote import RemoteRegistry
from .version import AliasMove, Version
from .wire import dump

LARGE_BYTES = 16 << 20
FOLDED = ("aliases", "base", "metrics", "message", "reason", "file", "fault")
WIDE = 160  # a table that goes to a file or a pipe is not folded to a terminal's width


@contextmanager
def transfer(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for much; nothing for little."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=total_bytes < LARGE_BYTES) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda sent_bytes: progress.advance(task, sent_bytes)


def say_pushed(version: Version, how: str) -> None:
    if version.pushed:
        click.echo(f"{how} {version} ({decimal(version.bytes)}, rank {version.rank}) {version.digest}")
    else:
        click.echo(f"{'restored' if version.restored else 'already'} {version} {version.digest}")


def say_move(move: AliasMove) -> None:
    if not move.moved:
        click.echo(f"{move} already points to {move.name}:{move.to_number}")
    else:
        click.echo(_change(move))


def _change(move: AliasMove) -> str:
    before = f"{move.name}:{move.from_number} → " if move.from_number else ""
    return f"{move}: {before}{f'{move.name}:{move.to_number}' if move.to_number else 'nothing'}"


def move_line(move: AliasMove) -> str:
    reason = f": {' '.join(move.reason.split())}" if move.reason else ""  # one line, whatever was given
    return f"{move.at.astimezone():%Y-%m-%d %H:%M:%S}  {_change(move)}  {move.action} by {move.who}{reason}"


def where_is(registry: Registry | RemoteRegistry) -> str:
    return registry.where if isinstance(registry, Registry) else registry.url


def print_versions(found: list[Version], style: str) -> None:
    if style == "json":
        print_json([plain(version) for version in found])
        return
    table = make_table("version", "aliases", "base", "rank", "size", "metrics", "pushed", "by", "message", "digest")
    for version in found:
        row = (str(version), ", ".join(version.aliases), *facts(version), when(version), version.created_by)
        table.add_row(*row, version.message, version.digest[:19])
    print_table(table)


def facts(version: Version) -> tuple[str, str, str, str]:
    """Base, rank, size and metrics; those of the bare base are shown of one version alone: a table has no room."""
    own = {key: value for key, value in version.metrics.items() if not key.startswith("base_")}
    return version.base.id, str(version.rank), decimal(version.bytes), metrics_line(own)


def metrics_line(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())


def when(version: Version) -> str:
    return version.created_at.astimezone().strftime("%Y-%m-%d %H:%M")


def plain(item: Version | AliasMove) -> dict[str, Any]:
    """What the item is, without what the last act did to it."""
    fields = dump(type(item), item)
    return {key: value for key, value in fields.items() if key not in ("pushed", "restored", "moved")}


def make_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in FOLDED)
    return table


def print_table(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
