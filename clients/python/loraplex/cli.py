"""The `loraplex` command: asking a server from a shell, and the door to the other packages' commands.

Knows those only by name: they are imported when they are called.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NoReturn, cast

import click
import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .client import Client
from .lazy import LazyCommand, LazyGroup
from .protocol import CompletionOptions
from .records import Chunk, Completion
from .settings import DEFAULT_TIMEOUT_SECONDS, DEFAULT_URL, installed_version

url_option = click.option("--url", help=f"Server to ask.  [env: LORAPLEX_URL; default: {DEFAULT_URL}]")
timeout_option = click.option(
    "--timeout", type=float, default=DEFAULT_TIMEOUT_SECONDS, show_default=True, help="Longest silence, in seconds."
)


def format_option(plain: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--format: `plain` by default, or json."""
    return click.option("--format", "output", type=click.Choice([plain, "json"]), default=plain, show_default=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Many LoRA adapters over one base: train, version, promote and serve them."""


for lazy in (
    LazyCommand("serve", "loraplex_server.__main__:serve", short_help="Serve a base and its adapters.", extra="serve"),
    LazyCommand("train", "loraplex_trainer.__main__:train", short_help="Train from a YAML file.", extra="train"),
    LazyCommand("merge", "loraplex_trainer.commands:merge", short_help="Make base and adapter one.", extra="train"),
    LazyCommand("export", "loraplex_trainer.commands:export", short_help="Adapters for llama.cpp.", extra="train"),
    LazyCommand("registry", "loraplex_registry.cli:cli", short_help="Push, list, promote and pull adapters."),
):
    cli.add_command(lazy)


@cli.command()
@click.argument("prompt")
@click.option("--adapter", help="Reference, as quotes-tagger, quotes-tagger:3 or quotes-tagger@production.")
@click.option("--model", help="The base's id, or a reference.")
@click.option("--max-tokens", type=int)
@click.option("--temperature", type=float, help="0 takes the likeliest token each time.")
@click.option("--top-p", type=float)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
@click.option("--stream/--no-stream", default=None, help="Print as it comes.  [default: text on a terminal does]")
@url_option
@timeout_option
@format_option("text")
def complete(
    prompt: str,
    stop: tuple[str, ...],
    stream: bool | None,
    url: str | None,
    timeout: float,
    output: str,
    **rest: object,
) -> None:
    """Print the answer to PROMPT.

    "-" reads the prompt from standard input, less one newline at its end. The bearer key, where the server wants one,
    is taken from LORAPLEX_API_KEY. With --format json, --stream prints one JSON object per line for each piece.
    """
    if prompt == "-":
        prompt = _read_prompt()
    if stream is None:
        stream = output == "text" and sys.stdout.isatty()
    options = cast(CompletionOptions, {**rest, "stop": stop or None})
    with _client(url, timeout) as client:
        if not stream:
            answer = client.complete(prompt, **options)
            click.echo(_json(answer) if output == "json" else answer.text)
        elif output == "json":
            for chunk in client.stream(prompt, **options):
                click.echo(_json(chunk))
        else:
            _print_stream(client, prompt, options)


@cli.command()
@url_option
@timeout_option
@format_option("table")
def models(url: str | None, timeout: float, output: str) -> None:
    """List the base and the adapters that the server offers."""
    with _client(url, timeout) as client:
        found = client.models()
    if output == "json":
        click.echo(json.dumps([asdict(model) for model in found], indent=2, ensure_ascii=False))
        return
    table = Table("ID", "VERSION", "ALIASES", "DIGEST", "PARENT", box=None, header_style="bold", pad_edge=False)
    for model in found:
        digest = (model.digest or "").removeprefix("sha256:")[:12]
        version = "" if model.version is None else str(model.version)
        # Text, because a str is read as rich's markup, and an id may hold brackets.
        table.add_row(*map(Text, (model.id, version, ", ".join(model.aliases), digest, model.parent or "")))
    # In a pipe rich would assume 80 columns and cut or fold what does not fit.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


@cli.command()
def version() -> None:
    """Print the installed version."""
    click.echo(f"loraplex {installed_version()}")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and exits: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C. Errors take one line."""
    try:
        status = cli.main(argv, prog_name="loraplex", standalone_mode=False)
    except click.Abort as abort:
        sys.exit(130 if isinstance(abort.__cause__, KeyboardInterrupt) else _fail("aborted"))
    except click.exceptions.NoArgsIsHelpError as usage:
        click.echo(usage.format_message(), err=True)
        sys.exit(usage.exit_code)
    except click.UsageError as usage:
        path = usage.ctx.command_path if usage.ctx else "loraplex"
        sys.exit(_fail(f"{usage.format_message()} (see {path} --help)", usage.exit_code))
    except click.ClickException as error:
        sys.exit(_fail(error.format_message(), error.exit_code))
    except Exception as error:
        # Every package of ours draws one error tree, and OSError is the world's; the rest is a bug and shows its trace.
        if not (isinstance(error, OSError) or type(error).__module__.startswith("loraplex")):
            raise
        never_connected = isinstance(error.__cause__, httpx.ConnectError)
        sys.exit(_fail(f"{error} (is `loraplex serve` running? --url says where)" if never_connected else str(error)))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 1) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return status


def _client(url: str | None, timeout: float) -> Client:
    try:
        return Client(url, timeout=timeout)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _read_prompt() -> str:
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.ClickException(f"PROMPT: standard input is not UTF-8: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _print_stream(client: Client, prompt: str, options: CompletionOptions) -> None:
    try:
        for chunk in client.stream(prompt, **options):
            click.echo(chunk.text, nl=False)
    finally:  # also before an error's line
        click.echo()


def _json(record: Completion | Chunk) -> str:
    return json.dumps(asdict(record), ensure_ascii=False)
