"""A training run from top to bottom: read the data, train the adapter, score it, swap the finished folder in.

Assembles the other files; each step's how is in the file named after it.
"""

import gc
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loraplex_server.engine.model import Base, load_base
from loraplex_trainer.adapter import attach_adapter, load_weights, save_adapter
from loraplex_trainer.checkpoint import (
    Progress,
    finish_swap,
    load_progress,
    restore_state,
    save_checkpoint,
    swap_in,
    writing,
)
from loraplex_trainer.config import RunConfig
from loraplex_trainer.curve import write_curve
from loraplex_trainer.data import Encoded, Split, encode_split, read_splits
from loraplex_trainer.encoding import Encoder, Example, encoder_for
from loraplex_trainer.errors import CheckpointError, ConfigError, DataError, Interrupted
from loraplex_trainer.evaluate import evaluate, score_table
from loraplex_trainer.fast import use_kernels
from loraplex_trainer.identity import difference, run_identity
from loraplex_trainer.lock import locked_folder
from loraplex_trainer.loop import Loop, mean_loss, stop_signals
from loraplex_trainer.packing import pack, prepare_packing
from loraplex_trainer.parent import find_parent
from loraplex_trainer.progress import reporting, say
from loraplex_trainer.receipt import Trained, base_record, receipt_of, write_receipt
from loraplex_trainer.stopping import should_stop
from loraplex_trainer.team import ALONE, Team, join_team
from loraplex_trainer.tracking import check_packages, tracking


def train(config: RunConfig, *, resume: bool, console: Console) -> Path:
    """Runs the whole of `config` and returns the adapter's folder, which is complete when it appears.

    Raises ConfigError, DataError and CheckpointError for what is wrong before training; NotFinite and Interrupted
    during it; EngineError for a base that cannot be loaded.
    """
    check_packages(config)
    splits = read_splits(config.data)
    say_what_is_the_same(splits, config.data.on_leak, console)
    team = join_team(config.base.device)
    if not team.is_first:
        team.wait()
        earlier = load_progress(checkpoint_folder(config)) if resume else None
        _train_adapter(config, splits, earlier, None, team, console)
        return config.folder
    with _partial_folder(config) as partial:
        finish_swap(config.folder)
        earlier = load_progress(checkpoint_folder(config)) if resume else None
        team.wait()
        trained = _train_adapter(config, splits, earlier, partial, team, console)
        _free_memory()
        metrics: dict[str, float] = {}
        if "heldout" in splits and config.evaluation.metric != "none":
            say(console, f"scoring {len(splits['heldout'].samples)} held-out prompts with the serving engine")
            metrics = evaluate(config, partial, splits["heldout"])
        with writing(partial, "the adapter"):
            write_receipt(partial, receipt_of(config, splits, trained, metrics))
            swap_in(partial, config.folder)
    if metrics or trained.heldout_loss is not None:
        console.print(score_table(metrics, trained.heldout_loss))
    return config.folder


def checkpoint_folder(config: RunConfig) -> Path:
    return config.folder / ".checkpoint"


def _train_adapter(
    config: RunConfig,
    splits: dict[str, Split],
    earlier: Progress | None,
    folder: Path | None,
    team: Team,
    console: Console,
) -> Trained:
    """Loads, trains, measures the held-out loss and writes the adapter's two files into `folder`, if there is one."""
    started = time.monotonic() - (earlier.wall_seconds if earlier else 0.0)
    training = config.training
    base = load_base(**config.base.load_options)
    encoder = encoder_for(base, config.data)
    encoded = encode_splits(config, splits, base, encoder, console)
    loop = build_loop(config, base, encoded["train"], team)
    model = loop.model
    identity = _go_on(loop, config, splits, base, earlier) if earlier else _begin(loop, config, splits, base)
    team.share_weights(loop.parameters)
    say(console, _opening(loop, base, encoded["train"]))
    with (
        tracking(config if team.is_first else None) as trackers,
        stop_signals() as stopped,
        reporting(console, loop, trackers) as reporter,
    ):

        def after_step(loop: Loop) -> bool:
            finished = loop.step == loop.total_steps
            # Asked once: a signal that comes during the report waits for the next step's save.
            stopping = team.any(bool(stopped))
            measure_due = loop.is_due(training.evaluate_every)
            save_due = stopping or loop.is_due(training.save_every)
            report_due = loop.is_due(training.log_every_steps)
            if measure_due or save_due or report_due:
                loop.read_losses()  # a loss that is not finite stops here, before it is saved
            if measure_due:
                loop.measure(encoded["heldout"].examples)
                reporter.measured(loop)
                finished = finished or should_stop(loop.evaluations, training.early_stopping)
            if report_due:
                reporter.report(loop)
            if (save_due or finished) and team.is_first:
                seconds = time.monotonic() - started
                progress = Progress(loop.step, tuple(loop.losses), tuple(loop.evaluations), seconds, identity)
                save_checkpoint(checkpoint_folder(config), progress, loop)
            if stopping and not finished:
                raise Interrupted(stopped[0] if stopped else signal.SIGTERM, loop.step)
            return finished

        if not should_stop(loop.evaluations, training.early_stopping):  # a checkpoint may be the one it stopped at
            loop.run(after_step)
    if loop.step < loop.total_steps:
        say(console, f"stopped at step {loop.step}: the held-out loss no longer falls")
    kept_step = loop.settle()
    if kept_step < loop.step:
        say(console, f"kept: the weights of step {kept_step}, where the held-out loss was lowest")
    heldout_loss = dict(loop.evaluations).get(kept_step)
    if heldout_loss is None and "heldout" in encoded:
        heldout_loss = mean_loss(model, encoded["heldout"].examples, training.batch_size, loop.pad_id, team)
    team.leave()
    if folder is not None:
        with writing(folder, "the adapter"):
            save_adapter(model, folder, base.id, base.revision)
            write_curve(folder, loop.losses, loop.evaluations, training, loop.total_steps)
    losses, evaluations, parent = tuple(loop.losses), tuple(loop.evaluations), identity["parent"]
    return Trained(
        base_record(base), encoded, encoder.template, losses, evaluations, kept_step, heldout_loss, parent, started
    )


def build_loop(config: RunConfig, base: Base, train: Encoded, team: Team = ALONE) -> Loop:
    """A fresh adapter on `base`, and the loop that trains it."""
    torch.manual_seed(config.training.seed)
    model = attach_adapter(base, config.lora)
    if config.training.kernels:
        use_kernels(model)
    if config.data.packing:
        prepare_packing(model)
    pad_id = pad if isinstance(pad := base.tokenizer.pad_token_id, int) else 0  # neither attended to nor labelled
    return Loop(model, rows_of(train, config), config, pad_id, team)


def encode_splits(
    config: RunConfig, splits: dict[str, Split], base: Base, encoder: Encoder, console: Console
) -> dict[str, Encoded]:
    """Tokenizes every split; raises ConfigError and DataError for what does not fit the base's context."""
    limit = config.data.max_tokens
    if limit > base.context_tokens:
        raise ConfigError(
            f"data.max_tokens: {limit}: more than the {base.context_tokens} tokens of context of {base.id}"
        )
    if "heldout" in splits and config.evaluation.metric != "none":
        asked = [question for sample in splits["heldout"].samples if (question := encoder.question(sample))]
        if not asked:
            raise DataError(
                f"{splits['heldout'].path}: evaluation.metric needs answers to compare with, and there are none"
            )
        longest = max(len(question.prompt_ids) for question in asked)
        if longest + config.evaluation.max_tokens > base.context_tokens:
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


def _begin(loop: Loop, config: RunConfig, splits: dict[str, Split], base: Base) -> dict[str, Any]:
    """A new run, from fresh weights or a parent's; returns its identity."""
    with tempfile.TemporaryDirectory() as scratch:
        parent = find_parent(config, base.description, Path(scratch))
        if parent is None:
            return run_identity(config, splits, base, None)
        load_weights(loop.model, parent.folder)
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


def _opening(loop: Loop, base: Base, train: Encoded) -> str:
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
def _partial_folder(config: RunConfig) -> Iterator[Path]:
    """A folder beside the output in which it is made, by one run at a time: swapped in at the end, or thrown away."""
    partial = config.folder.with_name(f".{config.folder.name}.partial")
    with locked_folder(partial):
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
