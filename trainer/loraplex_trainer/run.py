"""A training run from top to bottom: read the data, train the adapter, score it, swap the finished folder in.

Assembles the other files; each step's how is in the file named after it.
"""

import errno
import gc
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loraplex_server.engine.model import Base
from loraplex_trainer.adapter import load_weights
from loraplex_trainer.checkpoint import Progress, finish_swap, load_progress, restore_state, swap_in, writing
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Encoded, Split, encode_split, read_splits
from loraplex_trainer.encoding import Encoder, Example, encoder_for
from loraplex_trainer.errors import CheckpointError, ConfigError, DataError, NotScored
from loraplex_trainer.evaluate import Plan, evaluate, score_table
from loraplex_trainer.fast import use_kernels
from loraplex_trainer.identity import difference, run_identity
from loraplex_trainer.lock import locked_folder
from loraplex_trainer.loop import Loop, memory_named
from loraplex_trainer.memory import attach_within_memory, load_within_memory
from loraplex_trainer.packing import pack, prepare_packing
from loraplex_trainer.parent import find_parent
from loraplex_trainer.places import check_places, in_the_way
from loraplex_trainer.progress import say
from loraplex_trainer.push import FINAL, Pushes, check_registry
from loraplex_trainer.receipt import Trained
from loraplex_trainer.session import Session, checkpoint_folder, complete
from loraplex_trainer.team import ALONE, Team, join_team
from loraplex_trainer.tracking import check_packages


@dataclass(frozen=True)
class Material:
    """What a run is made of, as far as it is known without its base."""

    config: RunConfig
    splits: dict[str, Split]
    plan: Plan
    console: Console  # where the run speaks

    @classmethod
    def read(cls, config: RunConfig, console: Console) -> "Material":
        """Raises ConfigError and DataError for what is wrong before anything is loaded."""
        check_packages(config)
        check_places(config)
        check_registry(config)
        splits = read_splits(config.data)
        plan = Plan.of(config.evaluation)
        say_what_is_the_same(splits, config.data.on_leak, console)
        return cls(config, splits, plan, console)


def train(config: RunConfig, *, resume: bool, console: Console) -> Path:
    """Runs the whole of `config` and returns the adapter's folder, which is complete when it appears.

    Raises ConfigError, DataError and CheckpointError for what is wrong before training; NotFinite and Interrupted
    during it; EvaluationError and NotPushed after it; EngineError for a base that cannot be loaded.
    """
    material = Material.read(config, console)
    team = join_team(config)
    if team.size > 1 and config.base.device_map is not None:
        raise ConfigError(
            "base.device_map: each process of torchrun holds the whole base on its own device: leave it out"
        )
    if not team.is_first:
        team.wait()
        _train_adapter(material, load_progress(checkpoint_folder(config)) if resume else None, team, None, None)
        return config.folder
    with partial_folder(config) as partial, Pushes(config, console) as pushes:
        finish_swap(config.folder)
        earlier = load_progress(checkpoint_folder(config)) if resume else None
        if not resume:
            say_what_is_begun_anew(config, console)
        team.wait()
        trained = _train_adapter(material, earlier, team, partial, pushes)
        free_memory()
        finish(material, trained, partial, pushes)
    return config.folder


def _train_adapter(
    material: Material, earlier: Progress | None, team: Team, folder: Path | None, pushes: Pushes | None
) -> Trained:
    """Loads and trains, and writes the adapter's files into `folder`: None, and no pushes, where another one writes."""
    config, started = material.config, time.monotonic()
    base = load_within_memory(config.base, team.load_options(config.base))
    encoder = encoder_for(base, config.data)
    encoded = encode_splits(config, material.splits, base, encoder, material.console)
    loop = build_loop(config, base, encoded["train"], team)
    session = open_session(material, base, encoder, encoded, loop, earlier, pushes, started)
    say(material.console, opening(session))
    if told := team.begin(loop):
        say(material.console, told)
    trained = session.run()
    with team.whole(loop):
        if folder is not None:
            session.write(folder)
    team.leave()
    return trained


def open_session(
    material: Material,
    base: Base,
    encoder: Encoder,
    encoded: dict[str, Encoded],
    loop: Loop,
    earlier: Progress | None,
    pushes: Pushes | None,
    started: float,
    beside: tuple[str, ...] = (),
) -> Session:
    """The run as it begins, or where its checkpoint left off. `started`: time.monotonic() at which this process did."""
    config, splits = material.config, material.splits
    identity = _go_on(loop, config, splits, base, earlier) if earlier else _begin(loop, config, splits, base)
    started -= earlier.wall_seconds if earlier else 0.0
    if pushes:
        pushes.start(base.description)  # also where no step is left: what is finished then is pushed as well
    console = material.console
    return Session(config, splits, base, encoder, encoded, loop, identity, pushes, console, started, beside)


def finish(material: Material, trained: Trained, partial: Path, pushes: Pushes) -> None:
    """From an adapter's files in `partial` to its folder: measured, with card and receipt, and pushed."""
    config, console = material.config, material.console
    with memory_named(lambda: NotScored(config.base.quantization)):
        measured = evaluate(config, material.plan, partial, material.splits, trained.encoded, console)
    with writing(partial, "the adapter"):
        complete(partial, config, material.splits, trained, measured)
        pushes.add(FINAL, len(trained.losses), lambda place: shutil.copytree(partial, place, dirs_exist_ok=True))
        if reason := in_the_way(config.folder):  # it came while the run was at work
            raise FileExistsError(errno.EEXIST, reason)
        swap_in(partial, config.folder)
    if measured.metrics or trained.heldout_loss is not None:
        console.print(score_table(measured.metrics, trained.heldout_loss))
    pushes.finish()


def build_loop(config: RunConfig, base: Base, train: Encoded, team: Team = ALONE) -> Loop:
    """A fresh adapter on `base`, and the loop that trains it."""
    torch.manual_seed(config.training.seed)
    model = attach_within_memory(base, config)
    if config.training.kernels and not team.shares_base:  # the kernels pack whole weights
        use_kernels(model)
    if config.data.packing:
        prepare_packing(model)
    return Loop(model, rows_of(train, config), config, pad_id_of(base), team)


def pad_id_of(base: Base) -> int:
    """Which one does not matter: it is neither attended to nor labelled."""
    return pad if isinstance(pad := base.tokenizer.pad_token_id, int) else 0


def encode_splits(
    config: RunConfig, splits: dict[str, Split], base: Base, encoder: Encoder, console: Console
) -> dict[str, Encoded]:
    """Tokenizes every split; raises ConfigError and DataError for what does not fit the base's context."""
    limit, room = config.data.max_tokens, base.context_tokens - config.virtual_tokens
    if limit > room:
        beside = f", {config.virtual_tokens} of them for prompt.virtual_tokens" if config.virtual_tokens else ""
        raise ConfigError(
            f"data.max_tokens: {limit}: more than the {base.context_tokens} tokens of context of {base.id}{beside}"
        )
    asks = "heldout" in splits and config.data.form != "text"
    if (asks or config.evaluation.samples) and config.evaluation.max_tokens >= room:
        raise ConfigError(
            f"evaluation.max_tokens: {config.evaluation.max_tokens}: expected less than the {room} tokens that "
            f"{base.id} has room for, so that some are left for a prompt"
        )
    if "heldout" in splits and config.evaluation.metric != "none":
        asked = [question for sample in splits["heldout"].samples if (question := encoder.question(sample))]
        if not asked:
            raise DataError(
                f"{splits['heldout'].path}: evaluation.metric needs answers to compare with, and there are none"
            )
        longest = max(len(question.prompt_ids) for question in asked)
        if longest + config.evaluation.max_tokens > room:
            raise DataError(
                f"{splits['heldout'].path}: a prompt of {longest} tokens and evaluation.max_tokens = "
                f"{config.evaluation.max_tokens} are more than the {base.context_tokens} tokens of context of {base.id}"
            )
    encoded = {name: encode_split(split, encoder) for name, split in splits.items()}
    for name, split in encoded.items():
        if split.truncated or split.dropped or split.unlearnt:
            say(
                console,
                f"{name}: {split.what_was_lost} (data.truncation: {config.data.truncates_by}, max_tokens: {limit})",
            )
        if split.empty:
            say(console, f"{name}: {split.empty} examples have an empty answer: all that is learnt of them is to end")
    return encoded


def rows_of(train: Encoded, config: RunConfig) -> Sequence[Example]:
    """What a step is made of: the examples, or rows that they are packed into."""
    if not config.data.packing:
        return train.examples
    return pack(train.examples, config.data.max_tokens, config.training.seed)


def say_what_is_the_same(splits: dict[str, Split], on_leak: str, console: Console) -> None:
    for name, split in splits.items():
        if split.duplicates:
            say(console, f"{name}: {split.duplicates} of {len(split.samples)} examples are the same as one before")
    if leaks := splits["train"].leaks:
        what = "and left out" if on_leak == "drop" else "data.on_leak: drop leaves them out"
        say(console, f"train: {leaks} examples are held out too; {what}")
    if shared := splits["train"].shared_prompts:
        say(console, f"train: {shared} examples have the prompt of a held-out one, and another answer")


def say_what_is_begun_anew(config: RunConfig, console: Console) -> None:
    """The first save of a new run replaces the checkpoint of one that was interrupted; a damaged one is no loss."""
    folder = checkpoint_folder(config)
    with suppress(CheckpointError):
        step = load_progress(folder).step
        say(console, f"a checkpoint of step {step} is in {folder}: --resume goes on with it; this run begins anew")


def _begin(loop: Loop, config: RunConfig, splits: dict[str, Split], base: Base) -> dict[str, Any]:
    """A new run, from fresh weights or a parent's; returns its identity."""
    with tempfile.TemporaryDirectory() as scratch:
        parent = find_parent(config, base.description, Path(scratch))
        if parent is None:
            return run_identity(config, splits, base, None)
        load_weights(loop.model, parent.folder, loop.adapter)
        return run_identity(config, splits, base, parent.record)


def _go_on(loop: Loop, config: RunConfig, splits: dict[str, Split], base: Base, earlier: Progress) -> dict[str, Any]:
    """Puts `loop` where the checkpoint left off; raises CheckpointError when that was another run."""
    # The parent is the one found then: an alias may have moved since, the weights have not.
    ours = run_identity(config, splits, base, earlier.run["parent"])
    if change := difference(earlier.run, ours):
        raise CheckpointError(
            f"the checkpoint {checkpoint_folder(config)} is of another run: {change}; "
            "undo that, or start anew without --resume"
        )
    restore_state(checkpoint_folder(config), loop)
    loop.step, loop.losses, loop.evaluations = earlier.step, list(earlier.losses), list(earlier.evaluations)
    return earlier.run


def opening(session: Session) -> str:
    """What a run is, in one line."""
    loop, base, train = session.loop, session.base, session.encoded["train"]
    trainable = sum(parameter.numel() for parameter in loop.parameters.values())
    start = f", going on after step {loop.step}" if loop.step else ""
    rows = f" in {len(loop.examples)} rows" if loop.config.data.packing else ""
    return (
        f"{loop.config.name}: {len(train.examples)} examples{rows}, {train.tokens:,} tokens, loss on "
        f"{train.answer_tokens:,}; {trainable:,} trainable parameters on {base.id} "
        f"({base.quantization}, {base.device.type}); "
        f"{loop.total_steps} steps{start}"
    )


@contextmanager
def partial_folder(config: RunConfig) -> Iterator[Path]:
    """A folder beside the output in which it is made, by one run at a time: swapped in at the end, or thrown away."""
    partial = config.folder.with_name(f".{config.folder.name}.partial")
    with locked_folder(partial):
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
