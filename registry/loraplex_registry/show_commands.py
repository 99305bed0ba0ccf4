"""`registry show` and `diff`: everything about one version, or about what two do not share."""

import json
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.markdown import Markdown
from rich.table import Table

from .card import body_of
from .command import REF, opened, output_format, verb
from .diff import Diff, compare
from .printing import make_table, metrics_line, plain, print_json, print_table, when
from .protections import Approval
from .signing import Signature
from .version import Dataset, Lineage
from .wire import dump


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
        told = {"version": plain(version), "manifest": json.loads(manifest.canonical()), "card": card}
        print_json(told | {"signatures": signed, "approvals": dump(list[Approval], approvals)})
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
        "metrics": metrics_line(version.metrics) or "none",
        "parent": version.parent or "none",
        "datasets": "\n".join(map(_dataset_line, version.lineage.datasets)) or "unknown",
        "run": _run_line(version.lineage),
        "prompt": "unknown" if template.prompt is None else repr(template.prompt),
        "completion": "unknown" if template.completion is None else repr(template.completion),
        "form": template.form or "unknown",
        "chat template": "none" if template.chat is None else f"{len(template.chat):,} characters",
        "stop": ", ".join(map(repr, template.stop)) or "the end of the sequence",
        "pushed": f"{when(version)} by {version.created_by}",
        "message": version.message or "none",
        "signed": "\n".join(f"{one.key_id} by {one.who}" for one in signatures) or "by nobody",
        "approved": "\n".join(map(_approval_line, approvals)) or "by nobody",
        "files": "\n".join(f"{file.path}  {decimal(file.bytes)}  sha256:{file.sha256}" for file in manifest.files),
    }.items():
        table.add_row(key, str(value))
    print_table(table)
    if card:
        click.echo()
        _print_card(card)


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
        print_json(dump(Diff, found))
        return
    if not found.changes:
        click.echo(f"{found.before} and {found.after} are the same bytes")
        return
    table = make_table("", found.before, found.after)
    for change in found.changes:
        table.add_row(change.what, *("" if value is None else _said(value) for value in (change.before, change.after)))
    print_table(table)
    if not found.updates or not modules:
        return
    apart = sorted(found.updates, key=lambda update: -2 if update.cosine is None else update.cosine)[:modules]
    click.echo(f"\n|ΔW|, what is added to {len(found.updates)} modules, and their cosine; the furthest apart first:")
    table = make_table("module", found.before, found.after, "cosine")
    for update in apart:
        numbers = (update.before, update.after, update.cosine)
        table.add_row(update.module, *("" if number is None else f"{number:.4g}" for number in numbers))
    print_table(table)


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
