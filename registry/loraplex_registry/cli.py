"""The `registry` command: every verb on a folder or a URL. Owns words and tables; the registry does the work."""

import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.markdown import Markdown
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from .archive import export_versions, import_versions
from .card import body_of
from .completion import SHELLS, ReferenceType, script
from .database import upgrade_catalog
from .diff import Diff, compare
from .drafts import OpenDraft
from .errors import InvalidAdapter, InvalidReference, RateLimited, RegistryError, StoreUnavailable
from .pages import PAGE_LIMIT, pages, take
from .patience import Patience
from .protections import Approval
from .rates import Rate
from .reference import HubReference, Reference, check_name, check_tag, parse_alias
from .registry import CATALOG, Registry
from .remote import DATABASE, RemoteRegistry, open_registry
from .signing import PublicKey, Signature, check_signed
from .trusted_bases import TrustedBases
from .version import Act, AliasMove, Dataset, Fault, Lineage, Version
from .wire import dump

LARGE_BYTES = 16 << 20
FOLDED = ("aliases", "base", "metrics", "message", "reason", "file", "fault")
WIDE = 160  # a table that goes to a file or a pipe is not folded to a terminal's width


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


def main() -> None:
    """The console script."""
    cli(prog_name="registry")


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


@contextmanager
def opened() -> Iterator[Registry | RemoteRegistry]:
    def told(error: RateLimited) -> None:
        click.echo(f"more than {error.limit} requests; waiting {error.retry_after_seconds} s", err=True)

    with open_registry(click.get_current_context().obj, patience=Patience(told=told)) as registry:
        yield registry


# --- acts ---


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
            message = _with_source(message, source)
            fetch_from_hub(source, files, path)
        else:
            path = Path(folder) if folder else _find_adapter(name)
        total_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        with _transfer(f"push {name}", total_bytes) as progress:
            version = registry.push(name, path, base=base, message=message, progress=progress)
        if tags:
            registry.tag(str(version), tags)
    _say_pushed(version, "pushed")


@verb
@click.argument("name", type=NAME)
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the registry trusts.")
@click.option("--message", "-m", default="", help="What is new, for people; default: what the commits said.")
def publish(name: str, base: str | None, message: str) -> None:
    """Make a version of the files that Hub clients uploaded to NAME."""
    with opened() as registry:
        version = registry.publish_draft(name, base=base, message=message)
    _say_pushed(version, "published")


@verb
@click.argument("name", type=NAME)
def discard(name: str) -> None:
    """Forget the files that Hub clients uploaded to NAME and nobody published. Its versions stay."""
    with opened() as registry:
        registry.discard_draft(name)
    click.echo(f"discarded the unpublished files of {name}")


@verb
@click.argument("ref", type=REF)
@click.option("--to", "alias", required=True, metavar="ALIAS", help="The alias to move, for instance production.")
@click.option("--reason", default="", help="Why, for the ledger.")
@click.option("--require", multiple=True, metavar="COMPARISON", help="What must hold, as 'f1>=0.9'. Repeatable.")
def promote(ref: str, alias: str, reason: str, require: tuple[str, ...]) -> None:
    """Point an alias at a version."""
    with opened() as registry:
        _say_move(registry.promote(ref, alias, reason, require=require))


@verb
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@click.option("--to", "number", type=click.IntRange(1), metavar="VERSION", help="Default: the previous target.")
@click.option("--reason", default="", help="Why, for the ledger.")
def rollback(ref: str, number: int | None, reason: str) -> None:
    """Point an alias back at its previous target, or at a given version."""
    with opened() as registry:
        _say_move(registry.rollback(ref, number, reason))


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
        _say_move(registry.promote(ref, name, reason))


@alias.command("rm")
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@click.option("--reason", default="", help="Why, for the ledger.")
def remove_alias(ref: str, reason: str) -> None:
    """Remove an alias. Without `production`, a bare NAME means the newest version."""
    with opened() as registry:
        _say_move(registry.remove_alias(ref, reason))


@alias.command("history")
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@output_format
@click.pass_context
def alias_history(ctx: click.Context, ref: str, style: str) -> None:
    """Every move of an alias, newest first: `registry history`."""
    ctx.invoke(history, ref=ref, style=style)


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


@verb
@click.argument("ref", type=REF, metavar="NAME:VERSION")
@click.option("--reason", default="", help="Why, for the ledger.")
def delete(ref: str, reason: str) -> None:
    """Hide a version: it neither resolves nor is listed. Refused while an alias points to it."""
    with opened() as registry:
        click.echo(f"deleted {registry.delete(ref, reason)}; to bring it back: registry restore {ref}")


@verb
@click.argument("ref", type=REF, metavar="NAME:VERSION")
@click.option("--reason", default="", help="Why, for the ledger.")
def restore(ref: str, reason: str) -> None:
    """Bring a deleted version back."""
    with opened() as registry:
        click.echo(f"restored {registry.restore(ref, reason)}")


def seconds(_ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9})([smhd])", value)
    if not found:
        raise click.BadParameter(f"'{value}', expected a number and s, m, h or d, for instance 2h", param=option)
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@verb
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--grace", "grace_seconds", default="2h", callback=seconds, metavar="TIME", help="Spare what is younger.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Delete all but the newest N versions of each name.")
def gc(dry_run: bool, grace_seconds: int, keep: int | None) -> None:
    """Remove the bytes of versions deleted before the grace, and blobs that no version refers to."""
    with opened() as registry:
        found = registry.gc(grace_seconds, keep, dry_run)
    would = "would be " if dry_run else ""
    for version in found.deleted:
        click.echo(f"{version}: {would}deleted, the newest {keep} are kept")
    for version in found.purged:
        click.echo(f"{version}: {would}purged, it was deleted before the grace")
    click.echo(f"{found.files} files, {decimal(found.bytes)}, {would}removed")


@verb
@click.argument("ref", type=REF)
@click.argument("folder", metavar="[DIR]", required=False)
@signed_by
def pull(ref: str, folder: str | None, key_files: tuple[Path, ...]) -> None:
    """Write a version's files, proven by their sha256, to DIR (default: ./NAME)."""
    keys = [PublicKey.read(file) for file in key_files]
    with opened() as registry:
        dest = Path(folder or Reference.parse(ref).name)
        version = registry.pull(ref, dest, signed_by=keys)
    click.echo(f"pulled {version} to {dest} {version.digest}")


@verb
@click.argument("refs", type=REF, nargs=-1, required=True, metavar="REF...")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="A new file.")
def export(refs: tuple[str, ...], output: Path) -> None:
    """Write versions to one file, for `registry import` elsewhere."""
    with opened() as registry, _transfer("export", sum(registry.resolve(ref).bytes for ref in refs)) as progress:
        versions = export_versions(registry, refs, output, progress)
    click.echo(f"exported {', '.join(map(str, versions))} to {output} ({decimal(output.stat().st_size)})")


@verb
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--as", "name", metavar="NAME", help="Keep them under another name.")
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the adapters say.")
def import_(file: Path, name: str | None, base: str | None) -> None:
    """Push the versions of a file that `registry export` wrote; each keeps its digest and gets the next number."""
    with opened() as registry, _transfer("import", file.stat().st_size) as progress:
        for version in import_versions(registry, file, name=name, base=base, progress=progress):
            how = "imported" if version.pushed else "restored" if version.restored else "already"
            click.echo(f"{how} {version} {version.digest}")


# --- questions ---


most = click.option("--limit", type=click.IntRange(1), metavar="N", help="The most that are shown; default: all.")


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
                shown += [_plain(version) | {"pointers": pointers.get(version.name, {})} for version in versions]
            elif versions:
                _print_newest(versions, pointers, header=number == 0)
            else:
                click.echo(f"no adapters yet in {_where(registry)}; keep the first with: registry push NAME [DIR]")
            if left is not None and left <= 0:
                break
    if style == "json":
        _print_json(shown)


def _print_newest(versions: list[Version], pointers: dict[str, dict[str, int]], header: bool) -> None:
    table = _table("adapter", "newest", "aliases", "base", "rank", "size", "metrics", "pushed")
    table.show_header = header
    for version in versions:
        said = ", ".join(f"{alias} → {number}" for alias, number in pointers.get(version.name, {}).items())
        table.add_row(version.name, str(version.number), said, *_facts(version), _when(version))
    _print(table)


@verb
@click.argument("name", type=NAME)
@most
@output_format
def versions(name: str, limit: int | None, style: str) -> None:
    """All versions of NAME, newest first."""
    with opened() as registry:
        found = registry.versions(name)[::-1][:limit]
    _print_versions(found, style)


@verb
@click.argument("name", type=NAME, required=False)
@most
@output_format
def drafts(name: str | None, limit: int | None, style: str) -> None:
    """What Hub clients uploaded to NAME, or to any name, and nobody published yet."""
    with opened() as registry:
        found = take(lambda size, cursor: registry.drafts.page(name, size, cursor), limit)
        where = _where(registry)
    if style == "json":
        _print_json(dump(list[OpenDraft], found))
        return
    if not found:
        click.echo(f"no unpublished files in {where}")
        return
    table = _table("adapter", "files", "size", "last change", "by")
    for draft in found:
        at = f"{draft.at.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(draft.name, str(draft.files), decimal(draft.bytes), at, draft.who)
    _print(table)


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
    KEY: a metric, rank, bytes, version, name, base, by or created.
    """
    with opened() as registry:
        found = take(lambda size, cursor: registry.search_page(" ".join(terms), sort, size, cursor), limit)
    if not found and style == "table":
        click.echo("no version matches")
    else:
        _print_versions(found, style)


@verb
@click.argument("ref", type=REF)
@output_format
def show(ref: str, style: str) -> None:
    """Everything about one version."""
    with opened() as registry:
        version = registry.resolve(ref)
        manifest, card = registry.manifest(version.digest), registry.card(version.digest)
        signatures = registry.signatures.of(version.digest)
        approvals = registry.protections.approvals(str(version))
    if style == "json":
        signed = [dump(Signature, one) | {"key_id": one.key_id} for one in signatures]
        told = {"version": _plain(version), "manifest": json.loads(manifest.canonical()), "card": card}
        _print_json(told | {"signatures": signed, "approvals": dump(list[Approval], approvals)})
        return
    base, template = version.base, version.lineage.template
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in {
        "version": version,
        "digest": version.digest,
        "description": version.description or "none",
        "aliases": ", ".join(version.aliases) or "none",
        "tags": ", ".join(version.tags) or "none",
        "base": base.id + (f" @ {base.revision}" if base.revision else ""),
        "fingerprint": base.fingerprint or "unknown",
        "quantization": base.quantization or "unknown",
        "rank": version.rank,
        "targets": ", ".join(version.targets),
        "metrics": _metrics(version) or "none",
        "parent": version.parent or "none",
        "datasets": "\n".join(map(_dataset_line, version.lineage.datasets)) or "unknown",
        "run": _run_line(version.lineage),
        "prompt": "unknown" if template.prompt is None else repr(template.prompt),
        "completion": "unknown" if template.completion is None else repr(template.completion),
        "stop": ", ".join(map(repr, template.stop)) or "the end of the sequence",
        "pushed": f"{_when(version)} by {version.created_by}",
        "message": version.message or "none",
        "signed": "\n".join(f"{one.key_id} by {one.who}" for one in signatures) or "by nobody",
        "approved": "\n".join(map(_approval_line, approvals)) or "by nobody",
        "files": "\n".join(f"{file.path}  {decimal(file.bytes)}  sha256:{file.sha256}" for file in manifest.files),
    }.items():
        table.add_row(key, str(value))
    _print(table)
    if card:
        click.echo()
        _print_card(card)


@verb
@click.argument("before", type=REF, metavar="REF")
@click.argument("after", type=REF, metavar="REF")
@click.option("--modules", default=10, type=click.IntRange(0), help="How many are shown, the furthest apart first.")
@output_format
def diff(before: str, after: str, modules: int, style: str) -> None:
    """What is not the same in two versions: base, configuration, metrics, files, and what they add to each module."""
    with opened() as registry:
        found = compare(registry, before, after)
    if style == "json":
        _print_json(dump(Diff, found))
        return
    if not found.changes:
        click.echo(f"{found.before} and {found.after} are the same bytes")
        return
    table = _table("", found.before, found.after)
    for change in found.changes:
        table.add_row(change.what, *("" if value is None else _said(value) for value in (change.before, change.after)))
    _print(table)
    if not found.updates or not modules:
        return
    apart = sorted(found.updates, key=lambda update: -2 if update.cosine is None else update.cosine)[:modules]
    click.echo(f"\n|ΔW|, what is added to {len(found.updates)} modules, and their cosine; the furthest apart first:")
    table = _table("module", found.before, found.after, "cosine")
    for update in apart:
        numbers = (update.before, update.after, update.cosine)
        table.add_row(update.module, *("" if number is None else f"{number:.4g}" for number in numbers))
    _print(table)


@verb
@click.argument("ref", type=REF, metavar="NAME@ALIAS")
@output_format
def history(ref: str, style: str) -> None:
    """Every move of an alias, newest first."""
    with opened() as registry:
        moves = registry.history(*parse_alias(ref))[::-1]
    if style == "json":
        _print_json([_plain(move) for move in moves])
        return
    table = _table("when", "from", "to", "how", "who", "reason")
    for move in moves:
        at = move.at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(at, str(move.from_number or ""), str(move.to_number or ""), move.action, move.who, move.reason)
    _print(table)


@verb
@click.argument("ref", type=REF, metavar="[NAME[@ALIAS]]", required=False)
@click.option("--after", type=click.IntRange(0), metavar="ID", help="From the ledger's row ID on; default: from now.")
@output_format
def watch(ref: str | None, after: int | None, style: str) -> None:
    """Print the moves of all aliases, of NAME's or of one, as they are made, until Ctrl-C."""

    def cut(error: RegistryError) -> None:
        click.echo(f"{error}; trying again", err=True)

    with opened() as registry, suppress(KeyboardInterrupt), registry.watch(ref, after, cut) as moves:
        click.echo(f"watching {ref or 'all aliases'} in {_where(registry)}", err=True)
        for move in moves:
            click.echo(json.dumps(_plain(move), ensure_ascii=False) if style == "json" else _move_line(move))


@verb
@click.argument("name", type=NAME, required=False)
@click.option("--limit", default=50, type=click.IntRange(1), help="The most that are shown.")
@output_format
def audit(name: str | None, limit: int, style: str) -> None:
    """Who did what to NAME, or to all, and when and why; newest first."""
    with opened() as registry:
        acts = take(lambda size, cursor: registry.audit_page(name, size, cursor), limit)
    if style == "json":
        _print_json(dump(list[Act], acts))
        return
    table = _table("when", "who", "did", "what", "reason")
    for act in acts:
        at = act.at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(at, act.who, act.action, act.subject, act.reason)
    _print(table)


@verb
@click.argument("ref", type=REF, required=False)
@click.option("--all", "everything", is_flag=True, help="Every version; the default without REF.")
@signed_by
@output_format
def verify(ref: str | None, everything: bool, key_files: tuple[Path, ...], style: str) -> None:
    """Hash every file of REF, or of all versions. Exit code 1 when one is missing, truncated or altered.

    With --signed-by, REF must also be signed by one of the keys.
    """
    if key_files and not ref:
        raise click.UsageError("--signed-by goes with a REF")
    keys = [PublicKey.read(file) for file in key_files]
    if ref and everything:
        raise click.UsageError("give REF or --all, not both")
    with opened() as registry:
        if keys and ref:
            version = registry.resolve(ref)
            check_signed(str(version), version.digest, registry.signatures.of(version.digest), keys)
            ref = str(version)  # what was signed is what is hashed, wherever an alias goes meanwhile
        faults = registry.verify(ref)
    if style == "json":
        _print_json(dump(list[Fault], faults))
    elif not faults:
        signed = " and signed as wanted" if keys else ""
        click.echo(f"{ref or 'all versions'}: every file is what its digest says{signed}")
    else:
        table = _table("version", "file", "fault")
        for fault in faults:
            table.add_row(fault.version, fault.path, fault.what)
        _print(table)
    if faults:
        sys.exit(1)


@verb
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8100, type=click.IntRange(0, 65535))
@click.option("--token-file", type=click.Path(path_type=Path), help="Bearer tokens, one a line: [WHO] TOKEN.")
@click.option("--base", "bases", multiple=True, metavar="BASE", help="ID, PATH or ID=PATH that uploads may belong to.")
@database_option
@click.option("--store", metavar="URL", help="s3://bucket/prefix, for the blobs; also LORAPLEX_REGISTRY_STORE.")
@click.option("--rate-limit", metavar="RATE", help="How often each token or address may ask, as 600/min; default: any.")
def serve(
    host: str,
    port: int,
    token_file: Path | None,
    bases: tuple[str, ...],
    database: str | None,
    store: str | None,
    rate_limit: str | None,
) -> None:
    """Serve the registry over HTTP.

    To the tokens of `registry token create` come those of the file and of LORAPLEX_REGISTRY_TOKENS, between commas;
    these may do everything.
    """
    import uvicorn

    from .http import create_app
    from .watchers import StreamingServer

    tokens, trusted = _read_tokens(token_file), TrustedBases.describe(bases)
    rate = Rate.parse(rate_limit) if rate_limit else None
    with open_registry(click.get_current_context().obj, database=database, store=store) as registry:
        if not isinstance(registry, Registry):
            raise OneLine(f"serve needs a folder, not {registry.url}")
        listener = _listen(host, port)
        url = f"http://{host}:{listener.getsockname()[1]}"
        click.echo(f"registry {registry.where} at {url}", err=True)
        if not tokens and not registry.tokens.any() and host not in ("127.0.0.1", "localhost", "::1"):
            click.echo("warning: no tokens are set, so everyone who reaches this address may push", err=True)
        app = create_app(registry, tokens, trusted, rate)
        server = StreamingServer(uvicorn.Config(app, log_level="warning"))
        with suppress(KeyboardInterrupt):  # Ctrl-C is how one ends it
            server.run(sockets=[listener])


@cli.group()
def hub() -> None:
    """Bring adapters from the Hugging Face Hub, and take them there."""


@partial(verb, group=hub)
@click.argument("source", metavar="OWNER/REPO[@REVISION]")
@click.option("--as", "name", metavar="NAME", help="Default: OWNER/REPO.")
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the adapter says.")
@click.option("--message", "-m", default="", help="What is new, for people; the commit is added to it.")
@click.option("--endpoint", metavar="URL", help="Another Hub; default: HF_ENDPOINT, then huggingface.co.")
def pull_(source: str, name: str | None, base: str | None, message: str, endpoint: str | None) -> None:
    """Fetch an adapter, prove its files by what the Hub says of them, and keep it as the next version of NAME.

    What was fetched before a failure is not fetched again. HF_TOKEN, or `hf auth login`, opens what is private.
    """
    ref = HubReference.parse(f"hf://{source.removeprefix('hf://')}")
    try:
        check_name(name or ref.repo_id)
    except InvalidReference as error:
        raise OneLine(f"{error}" if name else f"{error}; name it with --as NAME") from error
    from .hub import fetch_from_hub, find_on_hub  # here: it costs a third of a second that other verbs need not pay
    from .hub_downloads import download_folder

    with opened() as registry:
        commit, files = find_on_hub(ref, registry.limits, endpoint)
        with download_folder(commit, endpoint or os.environ.get("HF_ENDPOINT", "")) as folder:
            fetch_from_hub(commit, files, folder, endpoint)
            with _transfer(f"push {name or ref.repo_id}", sum(one.size or 0 for one in files)) as progress:
                message = _with_source(message, commit)
                version = registry.push(name or ref.repo_id, folder, base=base, message=message, progress=progress)
    _say_pushed(version, f"{commit} is")


@partial(verb, group=hub)
@click.argument("ref", type=REF)
@click.argument("repo", metavar="OWNER/REPO")
@click.option("--private", is_flag=True, help="Make it private, and refuse one that is there and is not.")
@click.option("--revision", metavar="BRANCH", help="Default: main. A branch that is not there is made.")
@click.option("--endpoint", metavar="URL", help="Another Hub; default: HF_ENDPOINT, then huggingface.co.")
def push_(ref: str, repo: str, private: bool, revision: str | None, endpoint: str | None) -> None:
    """Upload the files of a version as one commit to OWNER/REPO, which is made if it is not there."""
    target = HubReference.parse(f"hf://{repo.removeprefix('hf://')}")
    if target.revision:
        raise click.UsageError(f"give the branch with --revision {target.revision}")
    from .hub import push_to_hub

    with opened() as registry, tempfile.TemporaryDirectory() as temporary:
        version = registry.resolve(ref)
        folder = registry.fetch(version.digest, Path(temporary) / "files")
        url = push_to_hub(folder, version, target.repo_id, private=private, revision=revision, endpoint=endpoint)
    click.echo(f"{version} is {url}")


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what teaches a shell to complete verbs, options, names, versions and aliases."""
    click.echo(script(shell))


@cli.group()
def db() -> None:
    """Care for the catalog of a registry in a folder."""


@db.command()
@database_option
@click.pass_obj
def upgrade(where: str | None, database: str | None) -> None:
    """Bring the catalog of an older release to this release's schema. Stop what uses the registry first."""
    if where and where.startswith(("http://", "https://")):
        raise OneLine(f"db upgrade needs a folder, not {where}")
    root = Path(where).expanduser() if where else Registry.default_root()
    before, after = upgrade_catalog(root / CATALOG, database or os.environ.get(DATABASE))
    click.echo(f"{root}: schema {before}" + (f" → {after}" if after != before else ", nothing to upgrade"))


# --- words and tables ---


def _with_source(message: str, source: HubReference) -> str:
    return f"{message} ({source})" if message else f"from {source}"


def _find_adapter(name: str) -> Path:
    places = [Path("adapters") / name, Registry.default_root().parent / "adapters" / name]
    for place in places:
        if place.is_dir():
            return place
    raise InvalidAdapter(f"no folder for '{name}': looked for {' and '.join(map(str, places))}; give DIR")


def _read_tokens(file: Path | None) -> dict[str, str]:
    from .http import read_tokens

    tokens = read_tokens(os.environ.get("LORAPLEX_REGISTRY_TOKENS", "").replace(",", "\n"))
    if file:
        try:
            found = read_tokens(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise OneLine(f"the token file '{file}' cannot be read: {error}") from error
        if not found:
            raise OneLine(f"the token file '{file}' holds no token")
        tokens |= found
    return tokens


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # asyncio sets this only where it made the socket itself. Without it an answer's body waits 40 ms for the
        # client's acknowledgement of its head. Connections take it over from here.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address once more
        raise StoreUnavailable(f"cannot listen on {host}:{port}: {reason}") from error


@contextmanager
def _transfer(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for much; nothing for little."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=total_bytes < LARGE_BYTES) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda sent_bytes: progress.advance(task, sent_bytes)


def _say_pushed(version: Version, how: str) -> None:
    if version.pushed:
        click.echo(f"{how} {version} ({decimal(version.bytes)}, rank {version.rank}) {version.digest}")
    else:
        click.echo(f"{'restored' if version.restored else 'already'} {version} {version.digest}")


def _say_move(move: AliasMove) -> None:
    if not move.moved:
        click.echo(f"{move} already points to {move.name}:{move.to_number}")
    else:
        click.echo(_change(move))


def _change(move: AliasMove) -> str:
    before = f"{move.name}:{move.from_number} → " if move.from_number else ""
    return f"{move}: {before}{f'{move.name}:{move.to_number}' if move.to_number else 'nothing'}"


def _move_line(move: AliasMove) -> str:
    reason = f": {' '.join(move.reason.split())}" if move.reason else ""  # one line, whatever was given
    return f"{move.at.astimezone():%Y-%m-%d %H:%M:%S}  {_change(move)}  {move.action} by {move.who}{reason}"


def _where(registry: Registry | RemoteRegistry) -> str:
    return registry.where if isinstance(registry, Registry) else registry.url


def _print_versions(found: list[Version], style: str) -> None:
    if style == "json":
        _print_json([_plain(version) for version in found])
        return
    table = _table("version", "aliases", "base", "rank", "size", "metrics", "pushed", "by", "message", "digest")
    for version in found:
        row = (str(version), ", ".join(version.aliases), *_facts(version), _when(version), version.created_by)
        table.add_row(*row, version.message, version.digest[:19])
    _print(table)


def _print_card(card: str) -> None:
    """Rendered on a terminal, without what would control it; elsewhere as it is."""
    console = Console()
    if console.is_terminal:
        console.print(Markdown("".join(c for c in body_of(card) if c == "\n" or c.isprintable())))
    else:
        click.echo(body_of(card))


def _dataset_line(dataset: Dataset) -> str:
    examples = "" if dataset.examples is None else f"  {dataset.examples:,} examples"
    return f"{dataset.split}: {dataset.path}{examples}" + (f"  sha256:{dataset.sha256}" if dataset.sha256 else "")


def _approval_line(approval: Approval) -> str:
    return f"for {approval.alias} by {approval.who}, {approval.at.astimezone():%Y-%m-%d %H:%M}"


def _run_line(lineage: Lineage) -> str:
    said = {"": lineage.run, "seed ": lineage.seed, "steps ": lineage.steps}
    return ", ".join(f"{key}{value}" for key, value in said.items() if value is not None) or "unknown"


def _facts(version: Version) -> tuple[str, str, str, str]:
    return version.base.id, str(version.rank), decimal(version.bytes), _metrics(version)


def _metrics(version: Version) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in version.metrics.items())


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _when(version: Version) -> str:
    return version.created_at.astimezone().strftime("%Y-%m-%d %H:%M")


def _plain(item: Version | AliasMove) -> dict[str, Any]:
    """What the item is, without what the last act did to it."""
    fields = dump(type(item), item)
    return {key: value for key, value in fields.items() if key not in ("pushed", "restored", "moved")}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in FOLDED)
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def _print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


# Last, since the commands of other files hang themselves on `cli`.
from . import login_commands, protect_commands, sign_commands, token_commands  # noqa: E402, F401
