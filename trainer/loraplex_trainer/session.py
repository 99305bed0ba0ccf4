"""One run on a loaded base: what is due after each step, and what is left of it when the steps are done.

Knows its loop, its checkpoint and its drafts; what they are made from is put together in `run`.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars

from loraplex_server.engine.model import Base
from loraplex_trainer.adapter import save_adapter
from loraplex_trainer.card import write_card
from loraplex_trainer.checkpoint import CHECKPOINT, Progress, save_checkpoint, writing
from loraplex_trainer.config import RunConfig
from loraplex_trainer.curve import write_curve
from loraplex_trainer.data import Encoded, Split
from loraplex_trainer.encoding import Encoder
from loraplex_trainer.errors import Interrupted
from loraplex_trainer.evaluate import Measured
from loraplex_trainer.loop import Loop, stop_signals
from loraplex_trainer.progress import Reporter, bars, say
from loraplex_trainer.push import DRAFT, Pushes, every_steps
from loraplex_trainer.receipt import Trained, base_record, receipt_of, write_receipt
from loraplex_trainer.stopping import should_stop
from loraplex_trainer.tracking import tracking

AfterStep = Callable[[Loop], bool]


@dataclass
class Session:
    """A run whose adapter is attached, at the step where it begins or goes on.

    `pushes` is None in the processes of a team that write nothing. `started` is the time.monotonic() at which a run
    without interruptions would have started.
    """

    config: RunConfig
    splits: dict[str, Split]
    base: Base
    encoder: Encoder
    encoded: dict[str, Encoded]
    loop: Loop
    identity: dict[str, Any]
    pushes: Pushes | None
    console: Console
    started: float
    beside: tuple[str, ...] = ()  # the names of the runs that are trained on the same base at the same time

    def run(self) -> Trained:
        """Takes the steps that are left. Raises NotFinite, OutOfMemory, NotWritten, Interrupted."""
        with stop_signals() as stopped, bars(self.console) as bar, self.at_work(stopped, bar) as after_step:
            if not self.is_over:
                self.loop.run(after_step)
        if self.loop.team.any(bool(stopped)):  # in the last step, or since
            raise self.interrupted(stopped)
        return self.settle()

    def interrupted(self, stopped: list[int]) -> Interrupted:
        """What ends a run that was asked to stop and has saved its step; `stopped`: the signals that came here."""
        return Interrupted(stopped[0] if stopped else signal.SIGTERM, self.loop.step)

    @property
    def is_over(self) -> bool:
        """Whether no step is left: a checkpoint may be the one it stopped at."""
        stopped_early = should_stop(self.loop.evaluations, self.config.training.early_stopping)
        return stopped_early or self.loop.step == self.loop.total_steps

    @contextmanager
    def at_work(self, stopped: list[int], bar: Bars | None, label: str = "training") -> Iterator[AfterStep]:
        """Trackers and progress of the steps that are left; gives what is done after each of them."""
        with tracking(self.config if self.loop.team.is_first else None) as trackers:
            reporter = Reporter(self.console, self.loop, bar, trackers, label)
            yield partial(self._after_step, reporter, stopped)

    def settle(self) -> Trained:
        """After the last step: the weights that are kept, and their held-out loss. Raises NotFinite."""
        loop = self.loop
        if loop.step < loop.total_steps:
            say(self.console, f"stopped at step {loop.step}: the held-out loss no longer falls")
        kept_step = loop.settle()
        if kept_step < loop.step:
            say(self.console, f"kept: the weights of step {kept_step}, where the held-out loss was lowest")
        heldout_loss = dict(loop.evaluations).get(kept_step)
        if heldout_loss is None and "heldout" in self.encoded:
            heldout_loss = loop.loss_now("held-out loss", self.encoded["heldout"].examples)
        return self._trained(kept_step, heldout_loss)

    def write(self, folder: Path) -> None:
        """The adapter as the model has it now, and the losses so far as a table and a picture."""
        loop = self.loop
        with writing(folder, "the adapter"):
            self._write_adapter(folder)
            write_curve(folder, loop.losses, loop.evaluations, self.config.training, loop.total_steps)

    def _write_adapter(self, folder: Path) -> None:
        save_adapter(self.loop.model, folder, self.base.id, self.base.revision, self.loop.adapter)

    def _after_step(self, reporter: Reporter, stopped: list[int], loop: Loop) -> bool:
        """Measures, reports, saves and pushes what is due; says whether the step was the last."""
        training = self.config.training
        finished = loop.step == loop.total_steps
        # Asked once: a signal that comes during the report waits for the next step's save.
        stopping = loop.team.any(bool(stopped))
        measure_due = loop.is_due(training.evaluate_every)
        save_due = stopping or loop.is_due(training.save_every)
        report_due = loop.is_due(training.log_every_steps)
        push_due = loop.is_due(every_steps(self.config.push.every, training.save_every))
        if measure_due or save_due or report_due or push_due:
            loop.read_losses()  # a loss that is not finite stops here, before it is saved
        if measure_due:
            loop.measure(self.encoded["heldout"].examples)
            reporter.measured(loop)
            finished = finished or should_stop(loop.evaluations, training.early_stopping)
        elif finished:
            loop.check_last()
        if report_due:
            reporter.report(loop)
        if save_due or finished or push_due:
            with loop.team.whole(loop):
                if (save_due or finished) and loop.team.is_first:
                    self._save()
                if push_due and self.pushes and not finished:
                    self.pushes.add(DRAFT, loop.step, self._write_draft)
        if stopping:
            raise self.interrupted(stopped)
        return finished

    def _save(self) -> None:
        loop, seconds = self.loop, time.monotonic() - self.started
        progress = Progress(loop.step, tuple(loop.losses), tuple(loop.evaluations), seconds, self.identity)
        save_checkpoint(checkpoint_folder(self.config), progress, loop)

    def _write_draft(self, folder: Path) -> None:
        self._write_adapter(folder)
        complete(folder, self.config, self.splits, self._trained(self.loop.step, None), Measured({}))

    def _trained(self, kept_step: int, heldout_loss: float | None) -> Trained:
        return Trained(
            base=base_record(self.base),
            encoded=self.encoded,
            template=self.encoder.template,
            mask=self.encoder.mask(self.encoded["train"].examples),
            losses=tuple(self.loop.losses),
            evaluations=tuple(self.loop.evaluations),
            kept_step=kept_step,
            heldout_loss=heldout_loss,
            parent=self.identity["parent"],
            processes=self.loop.team.size,
            started=self.started,
            beside=self.beside,
        )


def checkpoint_folder(config: RunConfig) -> Path:
    return config.folder / CHECKPOINT


def complete(folder: Path, config: RunConfig, splits: dict[str, Split], trained: Trained, measured: Measured) -> None:
    """Writes card and receipt beside the adapter's two files; the receipt is the last."""
    receipt = receipt_of(config, splits, trained, measured)
    write_card(folder, receipt, measured)
    write_receipt(folder, receipt)
