"""`registry list`, `versions`, `search` and `audit`: the questions with long answers."""

from typing import Any

import click

from .command import NAME, most, opened, output_format, verb
from .pages import PAGE_LIMIT, pages, take
from .printing import facts, make_table, plain, print_json, print_table, print_versions, when, where_is
from .version import Act, Version
from .wire import dump


@verb
@most
@output_format
def list_(limit: int | None, style: str) -> None:
    """The newest version of every adapter, and where its aliases point."""
    with opened() as registry:
        size, left = min(limit or PAGE_LIMIT, PAGE_LIMIT), limit
        shown: list[dict[str, Any]] = []
        for number, page in enumerate(pages(lambda cursor: registry.list_page(size, cursor))):
            versions, left = page.data[:left], left and left - len(page.data)
            pointers = page.aliases
            if style == "json":
                shown += [plain(version) | {"pointers": pointers.get(version.name, {})} for version in versions]
            elif versions:
                _print_newest(versions, pointers, header=number == 0)
            else:
                click.echo(f"no adapters yet in {where_is(registry)}; keep the first with: registry push NAME [DIR]")
            if left is not None and left <= 0:
                break
    if style == "json":
        print_json(shown)


def _print_newest(versions: list[Version], pointers: dict[str, dict[str, int]], header: bool) -> None:
    table = make_table("adapter", "newest", "aliases", "base", "rank", "size", "metrics", "pushed")
    table.show_header = header
    for version in versions:
        said = ", ".join(f"{alias} → {number}" for alias, number in pointers.get(version.name, {}).items())
        table.add_row(version.name, str(version.number), said, *facts(version), when(version))
    print_table(table)


@verb
@click.argument("name", type=NAME)
@most
@output_format
def versions(name: str, limit: int | None, style: str) -> None:
    """All versions of NAME, newest first."""
    with opened() as registry:
        found = registry.versions(name)[::-1][:limit]
    print_versions(found, style)


@verb
@click.argument("terms", nargs=-1, metavar="[TERM]...")
@click.option(
    "--sort",
    default="-created",
    metavar="KEY",
    help="-KEY: the highest first.",
)
@click.option("--limit", default=50, type=click.IntRange(1), help="The most that are shown.")
@output_format
def search(terms: tuple[str, ...], sort: str, limit: int, style: str) -> None:
    """Versions of any adapter for which every TERM holds.

    'f1>=0.9' or 'rank<=16' compares; base:tinyllama, name:, alias:production, target:q_proj, by:, digest: and parent:
    look at a field; so do tag:, dataset: and run:. Any other word is looked for in names, messages and descriptions.
    KEY: a metric, rank, bytes, version, name, base, by, description, dataset, run or created.
    """
    with opened() as registry:
        found = take(lambda size, cursor: registry.search_page(" ".join(terms), sort, size, cursor), limit)
    if not found and style == "table":
        click.echo("no version matches")
    else:
        print_versions(found, style)


@verb
@click.argument("name", type=NAME, required=False)
@click.option("--limit", default=50, type=click.IntRange(1), help="The most that are shown.")
@output_format
def audit(name: str | None, limit: int, style: str) -> None:
    """Who did what to NAME, or to all, and when and why; newest first."""
    with opened() as registry:
        acts = take(lambda size, cursor: registry.audit_page(name, size, cursor), limit)
    if style == "json":
        print_json(dump(list[Act], acts))
        return
    table = make_table("when", "who", "did", "what", "reason")
    for act in acts:
        at = act.at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(at, act.who, act.action, act.subject, act.reason)
    print_table(table)
