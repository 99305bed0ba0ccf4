"""The command `loraplex train`: reads the run files, runs them, and says in one line what went wrong if anything did.

Exit codes: 0 done; 1 failed on the way; 2 run file, data or checkpoint wrong, before any step; 130 and 143 stopped.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console

from loraplex_server.engine.errors import BaseNotFound, BaseUnusable, EngineError
from loraplex_server.engine.upstream import quiet
from loraplex_trainer.beside import check_together
from loraplex_trainer.errors import ConfigError, Interrupted, TrainerError
from loraplex_trainer.launch import read_launch
from loraplex_trainer.run_file import load_config
from loraplex_trainer.run_schema import FILE as SCHEMA

PRESETS = Path(__file__).with_name("presets")


class RunOrWord(click.Command):
    """A command whose first argument is a run file, or one of a few words that are commands of their own."""

    words: dict[str, click.Command] = {}  # noqa: RUF012

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        if args and args[0] in self.words:
            name = f"{info_name} {args[0]}"
            return self.words[args[0]].make_context(name, args[1:], parent, **extra)  # type: ignore[arg-type]
        return super().make_context(info_name, args, parent, **extra)  # type: ignore[arg-type]

    def invoke(self, ctx: click.Context) -> object:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(
    cls=RunOrWord,
    epilog="`loraplex train presets` lists run files to begin from. `loraplex train schema` prints the JSON Schema of "
    "run files, for editors.",
)
@click.argument("arguments", metavar="RUN_YAML... [KEY=VALUE]...", nargs=-1, required=True)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a run that was interrupted.")
@click.option("--check", "checking", is_flag=True, help="Read and show everything, train nothing, write nothing.")
@click.option("--no-timing", is_flag=True, help="With --check: take no timed steps, so that no weight is read.")
def train(arguments: tuple[str, ...], resume: bool, checking: bool, no_timing: bool) -> None:
    """Train a LoRA adapter as RUN_YAML says, or several at once on one base, one for each RUN_YAML.

    KEY=VALUE sets a key, such as training.learning_rate=1e-3, in every file.
    """
    if checking and resume:
        raise click.UsageError("--resume goes on with a run, and --check trains nothing: leave one out")
    if no_timing and not checking:
        raise click.UsageError("--no-timing is for --check: a run is not timed beforehand")
    files, overrides = _files_and_overrides(arguments)
    console = Console(highlight=False, quiet=_is_follower())
    go_on = shlex.join(["loraplex", "train", *arguments, "--resume"])
    try:
        tell = partial(console.print, markup=False, soft_wrap=True)
        configs = [load_config(file, overrides, tell) for file in files]
        if len(files) > 1:
            check_together(files, configs)
        # torch and its kin take seconds to import: a mistake in the run file is answered before.
        quiet()
        if checking:
            from loraplex_trainer.check import check, say_memory_together

            estimates = []
            for file, config in zip(files, configs, strict=True):
                if len(files) > 1:
                    tell(f"{file}:")
                estimates.append(check(config, console, timing=not no_timing))
            if len(files) > 1:
                say_memory_together(estimates, configs[0], console)
            return
        if len(files) > 1:
            from loraplex_trainer.several import train_several

            train_several(configs, resume=resume, console=console)
        else:
            from loraplex_trainer.run import train

            train(configs[0], resume=resume, console=console)
    except Interrupted as stop:
        end(f"{stop}; go on with: {go_on}", stop.exit_code)
    except KeyboardInterrupt:
        end(f"interrupted; a run that had begun goes on with: {go_on}", 130)
    except TrainerError as error:
        end(f"error: {error}", error.exit_code)
    except (BaseNotFound, BaseUnusable) as error:
        end(f"error: {error}", 2)
    except (EngineError, OSError) as error:
        end(f"error: {error}", 2 if checking else 1)
    else:
        for config in configs:
            hint = config.serving_hint
            push = f"registry push {config.name}" + (f"; {hint}" if hint else "")
            other = "use it with peft; registry and server do not take such an adapter"
            done = f"adapter: {config.folder}\nnext:    {push if config.served else other}"
            console.print(done, markup=False, soft_wrap=True)


def _files_and_overrides(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The first argument is a run file, and so is every other that is there, or is called like one."""
    first, *rest = arguments
    more = [text for text in rest if _is_file(text) or ("=" not in text and text.endswith((".yaml", ".yml")))]
    return [Path(text) for text in (first, *more)], [text for text in rest if text not in more]


def _is_file(text: str) -> bool:
    """Also of an override, which may be too long for a name: Path.is_file would raise."""
    return os.path.isfile(text)  # noqa: PTH113


@click.command()
def schema() -> None:
    """Print the JSON Schema of run files.

    An editor checks a run file whose first line is: # yaml-language-server: $schema=run.schema.json
    """
    click.echo(SCHEMA.read_text(encoding="utf-8"), nl=False)


@click.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List run files to begin from, or print the one called NAME, to be copied: > run.yaml."""
    files = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    if name is None:
        for stem, file in files.items():
            click.echo(f"{stem:<22}{_first_sentence(file.read_text(encoding='utf-8'))}")
    elif name in files:
        click.echo(files[name].read_text(encoding="utf-8"), nl=False)
    else:
        end(f"error: there is no preset {name!r}; there are {', '.join(files)}", 2)


def _first_sentence(run_file: str) -> str:
    """Of the comment that a preset begins with, over as many lines as it takes."""
    lines = takewhile(lambda line: line.startswith("# "), run_file.splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.removeprefix("# ") for line in lines))[0]


RunOrWord.words = {"presets": presets, "schema": schema}


def _is_follower() -> bool:
    """Whether torchrun started this process beside a first one, which speaks for all."""
    try:
        return read_launch().rank > 0
    except ConfigError:  # which whoever starts the run is told
        return False


def end(message: str, exit_code: int) -> NoReturn:
    """One line on stderr, and the exit code."""
    if not _is_follower():
        click.echo(" ".join(message.split()), err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    train(prog_name="loraplex train")
