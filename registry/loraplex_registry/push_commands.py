"""`registry push`, `publish`, `drafts` and `discard`: what becomes a version, and what waits to be one."""

import os
from contextlib import ExitStack
from pathlib import Path

import click
from rich.filesize import decimal

from .command import NAME, most, opened, output_format, verb
from .drafts import OpenDraft
from .errors import InvalidAdapter
from .pages import take
from .printing import make_table, print_json, print_table, say_pushed, transfer, where_is
from .reference import HubReference, check_name, check_tag
from .registry import Registry
from .wire import dump


@verb
@click.argument("name", type=NAME)
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the adapter says.")
@click.option("--message", "-m", default="", help="What is new, for people.")
@click.option("--tag", "tags", multiple=True, help="A tag for the version, new or not. Repeatable.")
def push(name: str, folder: str | None, base: str | None, message: str, tags: tuple[str, ...]) -> None:
    """Check an adapter folder and keep it as the next version of NAME.

    Without DIR: ./adapters/NAME, then adapters/NAME in LORAPLEX_HOME. DIR may be hf://owner/repo[@revision].
    """
    check_name(name)
    for tag in tags:
        check_tag(tag)
    with opened() as registry, ExitStack() as held:
        if folder and folder.startswith("hf://"):
            from .hub import fetch_from_hub, find_on_hub  # here: it costs a third of a second that others need not pay
            from .hub_downloads import download_folder

            source, files = find_on_hub(HubReference.parse(folder), registry.limits)
            path = held.enter_context(download_folder(source, os.environ.get("HF_ENDPOINT", "")))
            message = with_source(message, source)
            fetch_from_hub(source, files, path)
        else:
            path = Path(folder) if folder else _find_adapter(name)
        total_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        with transfer(f"push {name}", total_bytes) as progress:
            version = registry.push(name, path, base=base, message=message, progress=progress)
        if tags:
            registry.tag(str(version), tags)
    say_pushed(version, "pushed")


@verb
@click.argument("name", type=NAME)
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the registry trusts.")
@click.option("--message", "-m", default="", help="What is new, for people; default: what the commits said.")
def publish(name: str, base: str | None, message: str) -> None:
    """Make a version of the files that Hub clients uploaded to NAME."""
    with opened() as registry:
        version = registry.publish_draft(name, base=base, message=message)
    say_pushed(version, "published")


@verb
@click.argument("name", type=NAME, required=False)
@most
@output_format
def drafts(name: str | None, limit: int | None, style: str) -> None:
    """What Hub clients uploaded to NAME, or to any name, and nobody published yet."""
    with opened() as registry:
        found = take(lambda size, cursor: registry.drafts.page(name, size, cursor), limit)
        where = where_is(registry)
    if style == "json":
        print_json(dump(list[OpenDraft], found))
        return
    if not found:
        click.echo(f"no unpublished files in {where}")
        return
    table = make_table("adapter", "files", "size", "last change", "by")
    for draft in found:
        at = f"{draft.at.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(draft.name, str(draft.files), decimal(draft.bytes), at, draft.who)
    print_table(table)


@verb
@click.argument("name", type=NAME)
def discard(name: str) -> None:
    """Forget the files that Hub clients uploaded to NAME and nobody published. Its versions stay."""
    with opened() as registry:
        registry.discard_draft(name)
    click.echo(f"discarded the unpublished files of {name}")


def with_source(message: str, source: HubReference) -> str:
    return f"{message} ({source})" if message else f"from {source}"


def _find_adapter(name: str) -> Path:
    places = [Path("adapters") / name, Registry.default_root().parent / "adapters" / name]
    for place in places:
        if place.is_dir():
            return place
    raise InvalidAdapter(f"no folder for '{name}': looked for {' and '.join(map(str, places))}; give DIR")
