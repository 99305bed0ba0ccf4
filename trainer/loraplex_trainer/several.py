"""Several runs trained together, from top to bottom: what `run` is for one, with one base for all of them.

What a run is made of and how it is finished are `run`'s; whose turn it is in training, `together`'s.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loraplex_server.engine.errors import EngineError
from loraplex_trainer.checkpoint import Progress, finish_swap, load_progress
from loraplex_trainer.config import RunConfig
from loraplex_trainer.encoding import encoder_for
from loraplex_trainer.errors import AdapterTooLarge, CheckpointError, Interrupted, SomeFailed, TrainerError
from loraplex_trainer.identity import difference, settings_of
from loraplex_trainer.loop import Loop, memory_named, stop_signals
from loraplex_trainer.memory import load_within_memory
from loraplex_trainer.progress import Named, bars, say
from loraplex_trainer.push import Pushes
from loraplex_trainer.receipt import RECEIPT, Trained
from loraplex_trainer.run import (
    Material,
    encode_splits,
    finish,
    free_memory,
    open_session,
    opening,
    pad_id_of,
    partial_folder,
    rows_of,
    say_what_is_begun_anew,
)
from loraplex_trainer.session import Session, checkpoint_folder
from loraplex_trainer.together import Member, Shared, share, train_together

Failures = dict[str, Exception]  # by the names of the runs


@dataclass(frozen=True)
class Job:
    """One of the runs: what it is made of, where it left off, and where its adapter is made."""

    material: Material
    earlier: Progress | None
    partial: Path
    pushes: Pushes
    beside: tuple[str, ...]  # the names of the others

    @property
    def name(self) -> str:
        return self.material.config.name


def train_several(configs: Sequence[RunConfig], *, resume: bool, console: Console) -> None:
    """Runs all of `configs`, which `check_together` has passed; each adapter's folder is complete when it appears.

    Raises as `run.train` does for what is wrong before the first step. From there on a run that fails leaves the others
    at work, and SomeFailed tells of it at the end; Interrupted ends all, with their steps saved.
    """
    materials = [Material.read(config, Named(console, config.name)) for config in configs]
    with ExitStack() as stack:
        if not (jobs := _jobs(materials, resume, stack, console)):
            return
        trained, failures = _train_adapters(jobs, console)
        free_memory()
        for job in jobs:
            if job.name in trained:
                with _noted(job.name, failures):
                    finish(job.material, trained[job.name], job.partial, job.pushes)
    if failures:
        raise SomeFailed(failures, [config.name for config in configs if config.name not in failures])


def _jobs(materials: Sequence[Material], resume: bool, stack: ExitStack, console: Console) -> list[Job]:
    """Those that have something left to do. Raises CheckpointError where there is nothing to go on from."""
    jobs = []
    names = [material.config.name for material in materials]
    for material in materials:
        config = material.config
        partial = stack.enter_context(partial_folder(config))
        finish_swap(config.folder)
        finish_swap(checkpoint_folder(config))
        begun = resume and checkpoint_folder(config).exists()
        if resume and not begun and (config.folder / RECEIPT).is_file():
            _check_complete(config)
            say(console, f"{config.name}: complete, and left alone")
            continue
        earlier = load_progress(checkpoint_folder(config)) if begun else None
        if not resume:
            say_what_is_begun_anew(config, material.console)
        pushes = stack.enter_context(Pushes(config, material.console))
        jobs.append(Job(material, earlier, partial, pushes, tuple(name for name in names if name != config.name)))
    if resume and len(jobs) == len(materials) and not any(job.earlier for job in jobs):
        raise CheckpointError("nothing to resume: none of the runs has a checkpoint, and none is complete")
    return jobs


def _check_complete(config: RunConfig) -> None:
    """Raises CheckpointError for an adapter that was made by other settings than these."""
    receipt = json.loads((config.folder / RECEIPT).read_text(encoding="utf-8"))
    if change := difference(
        {"config": settings_of(receipt["config"])}, {"config": settings_of(config.model_dump(mode="json"))}
    ):
        raise CheckpointError(f"the adapter {config.folder} is complete, and of another run: {change}")


def _train_adapters(jobs: Sequence[Job], console: Console) -> tuple[dict[str, Trained], Failures]:
    """Loads the base once and trains; the files of an adapter that was trained are in its job's folder."""
    shared, sessions = _open_sessions(jobs, console)
    at_work = [session for session in sessions if not session.is_over]
    with stop_signals() as stopped, bars(console) as bar, ExitStack() as stack:
        members = [
            Member(session.loop, stack.enter_context(session.at_work(stopped, bar, session.config.name)))
            for session in at_work
        ]
        train_together(shared, members)
    failures: Failures = {member.loop.config.name: member.error for member in members if member.error}
    for error in failures.values():
        if isinstance(error, Interrupted):
            raise error
    if stopped:  # in the last step of all, or since
        raise sessions[-1].interrupted(stopped)
    trained = {}
    for job, session in zip(jobs, sessions, strict=True):
        if job.name not in failures:
            with _noted(job.name, failures), shared.mixed.alone(session.loop.adapter):
                trained[job.name] = session.settle()
                session.write(job.partial)
    return {name: one for name, one in trained.items() if name not in failures}, failures


def _open_sessions(jobs: Sequence[Job], console: Console) -> tuple[Shared, list[Session]]:
    started = time.monotonic()
    configs = [job.material.config for job in jobs]
    base = load_within_memory(configs[0].base, configs[0].base.load_options)
    encoders = [encoder_for(base, config.data) for config in configs]
    encoded = [
        encode_splits(job.material.config, job.material.splits, base, encoder, job.material.console)
        for job, encoder in zip(jobs, encoders, strict=True)
    ]
    with memory_named(lambda: AdapterTooLarge("lora")):
        shared = share(base, configs)
    sessions = []
    for job, encoder, splits, adapter in zip(jobs, encoders, encoded, shared.generators, strict=True):
        config, drawn = job.material.config, shared.generators[adapter]
        examples = rows_of(splits["train"], config)
        loop = Loop(shared.model, examples, config, pad_id_of(base), adapter=adapter, generators=drawn)
        session = open_session(job.material, base, encoder, splits, loop, job.earlier, job.pushes, started, job.beside)
        say(console, opening(session))
        sessions.append(session)
    return shared, sessions


@contextmanager
def _noted(name: str, failures: Failures) -> Iterator[None]:
    """What one run fails by is kept for the end: the others go on."""
    try:
        yield
    except (TrainerError, EngineError, OSError) as error:
        failures[name] = error
