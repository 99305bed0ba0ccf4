"""The commands `loraplex merge` and `loraplex export`: words and exit codes, as those of `loraplex train`."""

from pathlib import Path

import click

from loraplex_server.engine.errors import BaseNotFound, BaseUnusable, EngineError
from loraplex_server.engine.upstream import quiet
from loraplex_trainer.__main__ import end
from loraplex_trainer.errors import TrainerError
from loraplex_trainer.export import gguf_refusal
from loraplex_trainer.found import find_adapter

_REF = click.argument("ref", metavar="REF")
_BASE = click.option("--base", metavar="ID_OR_PATH", help="The base; default: the one it was trained on.")
_REGISTRY = click.option("--registry", metavar="DIR_OR_URL", envvar="LORAPLEX_REGISTRY", help="Where REF is looked up.")


@click.command()
@_REF
@_BASE
@_REGISTRY
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the merged model.")
@click.option("--quantization", metavar="SCHEME", help="As nf4; default: what it was trained on.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: what training computed in."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def merge(
    ref: str,
    registry: str | None,
    base: str | None,
    out: Path,
    quantization: str | None,
    dtype: str | None,
    device: str,
) -> None:
    """Merge the adapter REF (a reference, or a folder) into its base: a model that needs no adapter.

    The base is quantized as in training and dequantized again, for that is what the adapter was trained on. The
    folder holds safetensors, the tokenizer, and merge.json: how near its answers are to base and adapter apart.
    """
    try:
        quiet()
        with find_adapter(ref, registry, base, quantization) as adapter:
            from loraplex_trainer.merge import merge as merge_adapter

            receipt = merge_adapter(adapter, out, device, dtype)
    except TrainerError as error:
        end(f"error: {error}", error.exit_code)
    except (BaseNotFound, BaseUnusable) as error:
        end(f"error: {error}", 2)
    except (EngineError, OSError) as error:
        end(f"error: {error}", 1)
    else:
        found = receipt["merged_against_unmerged"]
        mean, most = found["mean_logprob_difference"], found["largest_logprob_difference"]
        same = f"{found['same_tokens']:.0%} of the answers are the same tokens"
        told = f"apart:   {mean:.4f} nats in the mean, {most:.4f} at most; {same}"
        click.echo(f"merged:  {out} ({receipt['dtype']}, from {receipt['quantization']})\n{told}")


@click.command()
@_REF
@_BASE
@_REGISTRY
@click.option("--format", "form", required=True, type=click.Choice(["gguf"]), help="What to make.")
def export(ref: str, registry: str | None, base: str | None, form: str) -> None:
    """Say how the adapter REF becomes a file for llama.cpp: by its own converter, which no package brings along."""
    try:
        with find_adapter(ref, registry, base, quantization="none") as adapter:
            end(f"error: {form}: {gguf_refusal(adapter, ref)}", 2)
    except TrainerError as error:
        end(f"error: {error}", error.exit_code)
    except (EngineError, OSError) as error:
        end(f"error: {error}", 1)
