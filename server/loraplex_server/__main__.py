"""The `serve` command: options, start-up in plain words, and one clear line when it cannot start."""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import click
from starlette.applications import Starlette

from loraplex_registry.signing import PublicKey
from loraplex_server.config import ServerConfig, read_adapter_weights, read_api_keys
from loraplex_server.engine.config import EngineConfig

_ENGINE = EngineConfig()
_SERVER = ServerConfig(base="")
QUANTIZATIONS = ["nf4", "fp4", "int8", "none"]  # those of engine.model, which imports torch


def _option(name: str, default: Any = None, **more: Any) -> Any:
    """An option that can also be set as LORAPLEX_<NAME>; its default is shown."""
    variable = "LORAPLEX_" + name.lstrip("-").replace("-", "_").upper()
    if default is not None:  # to click, a default of None is one too, and an option that is required has none
        more |= {"default": default, "show_default": True}
    return click.option(name, envvar=variable, show_envvar=True, **more)


@click.command()
@_option("--base", required=True, metavar="ID_OR_PATH", help="The base model: a folder or a Hub id.")
@_option("--revision", help="Commit, tag or branch of a base on the Hub.")
@_option("--registry", metavar="DIR_OR_URL", help="Where adapters come from. [default: LORAPLEX_HOME/registry]")
@_option("--host", _SERVER.host, help="Address to listen on; the default is reachable from this machine only.")
@_option("--port", _SERVER.port, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@_option("--quantization", _SERVER.quantization, type=click.Choice(QUANTIZATIONS), help="How the base is stored.")
@_option("--no-double-quantization", is_flag=True, help="Keep the scales of nf4 and fp4 in 32 bits.")
@_option("--device", _SERVER.device, type=click.Choice(["auto", "cpu", "cuda"]), help="Where the base runs.")
@_option("--dtype", _SERVER.dtype, type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Compute dtype.")
@_option("--max-loras", _ENGINE.max_loras, type=click.IntRange(1), help="Adapters on the device at once.")
@_option("--max-host-loras", _ENGINE.max_host_loras, type=click.IntRange(1), help="Adapters in host memory.")
@_option("--max-host-bytes", _ENGINE.max_host_bytes, type=click.IntRange(1), help="Host memory for all adapters.")
@_option("--max-rank", _ENGINE.max_rank, type=click.IntRange(1, 256), help="Highest LoRA rank that is served.")
@_option("--max-model-len", type=click.IntRange(2), help="Most tokens of prompt and completion. [default: the base's]")
@_option("--max-rows", _ENGINE.max_rows, type=click.IntRange(1), help="Requests that run at once.")
@_option("--max-queue", _ENGINE.max_waiting, type=click.IntRange(1), help="Requests that wait; one more gets 429.")
@_option("--request-timeout", _SERVER.request_timeout, type=click.FloatRange(0), help="Seconds; 0: no limit.")
@_option("--drain-seconds", _SERVER.drain_seconds, type=click.IntRange(0), help="To finish in when told to stop.")
@_option("--kv-cache-bytes", _ENGINE.kv_cache_bytes, type=click.IntRange(1), help="Memory for keys and values.")
@_option("--no-prefix-cache", is_flag=True, help="Compute every prompt whole, even where one began alike before.")
@_option("--no-golden-check", is_flag=True, help="Do not ask adapters the golden prompts of their receipts.")
@_option("--adapter-weight", multiple=True, metavar="NAME=NUMBER", help="Its share beside the others' 1; repeatable.")
@_option(
    "--lean", is_flag=True, help="On a CPU without kernels, keep 4-bit weights once, not twice; slow with many rows."
)
@_option("--no-kernels", is_flag=True, help="Compute by torch, bitsandbytes and peft alone, which is slower.")
@_option("--no-cuda-graphs", is_flag=True, help="On a CUDA device, run every step eagerly.")
@_option(
    "--require-signature",
    multiple=True,
    metavar="PUBFILE",
    help="Serve only what this key signed; repeatable.",
)
@_option("--api-key-file", type=click.Path(path_type=Path), help="Accepted bearer keys, one a line.")
@click.version_option(package_name="loraplex", prog_name="loraplex")
def serve(**options: Any) -> None:
    """Serve a base model and its LoRA adapters over an OpenAI-style HTTP API.

    Accepted bearer keys can also be given in LORAPLEX_API_KEYS, separated by commas.
    """
    try:
        _serve(options)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # the user's and the world's mistakes
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _serve(options: dict[str, Any]) -> None:
    config = _config(options)
    listener = _listen(config.host, config.port)  # before the base is loaded: a port in use is told at once
    click.echo(f"loading {config.base} ({config.quantization}) …")
    app = _app(config)
    base, registry = app.state.service.base, app.state.service.registry
    kernels = app.state.service.engine.backend.name
    click.echo(f"base {base.id} on {base.device.type}, {base.quantization}, {kernels}, {base.fingerprint[:19]}")
    click.echo(f"registry {getattr(registry, 'root', config.registry)}, {len(registry.list())} adapters")
    host = f"[{config.host}]" if ":" in config.host else config.host
    click.echo(f"listening on http://{host}:{listener.getsockname()[1]}")
    from loraplex_server.drain import DrainingServer

    stop = app.state.service.loop.stop
    DrainingServer(app, app.state.door, config.drain_seconds, stop).run(sockets=[listener])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a load may still hold the process up: Ctrl-C now, and no traceback


def _app(config: ServerConfig) -> Starlette:
    """The application; torch and its like are imported here, since --help and a port in use need them not."""
    from loraplex_server.engine.upstream import quiet

    quiet()
    from loraplex_server.app import create_app

    return create_app(config)


def _config(options: dict[str, Any]) -> ServerConfig:
    engine = EngineConfig(
        max_loras=options["max_loras"],
        max_host_loras=options["max_host_loras"],
        max_host_bytes=options["max_host_bytes"],
        max_rank=options["max_rank"],
        max_rows=options["max_rows"],
        max_waiting=options["max_queue"],
        max_model_len=options["max_model_len"],
        kv_cache_bytes=options["kv_cache_bytes"],
        prefix_cache=not options["no_prefix_cache"],
        check_goldens=not options["no_golden_check"],
        lean=options["lean"],
        kernels=not options["no_kernels"],
        cuda_graphs=not options["no_cuda_graphs"],
    )
    keys = read_api_keys(options["api_key_file"], os.environ.get("LORAPLEX_API_KEYS"))
    named = (
        "base", "revision", "quantization", "device", "dtype", "registry", "host", "port",
        "request_timeout", "drain_seconds",
    )  # fmt: skip
    weights = read_adapter_weights(options["adapter_weight"])
    return ServerConfig(
        **{name: options[name] for name in named},
        double_quantization=not options["no_double_quantization"],
        api_keys=keys,
        signed_by=tuple(PublicKey.read(Path(file)) for file in options["require_signature"]),
        adapter_weights=weights,
        engine=engine,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # asyncio sets this only where it made the socket itself. Without it an answer's body waits 40 ms for the client's
    # acknowledgement of its head. Connections take it over from here.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host or --port"
        ) from error
    return listener


if __name__ == "__main__":
    serve()
