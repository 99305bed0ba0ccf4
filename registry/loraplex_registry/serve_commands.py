"""`registry serve`: the registry in a folder, over HTTP."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import click

from .command import OneLine, database_option, verb
from .errors import StoreUnavailable
from .rates import Rate
from .registry import Registry
from .remote import open_registry
from .trusted_bases import TrustedBases


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
