"""Shows how a run goes: a bar on a terminal, one plain line every few steps in a log. Knows only the loop's numbers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraplex_trainer.loop import Loop
from loraplex_trainer.tracking import Trackers


class Reporter:
    """Says loss, learning rate, tokens per second, memory and the time left, each time it is asked to."""

    def __init__(
        self, console: Console, loop: Loop, bar: Progress | None, trackers: Trackers, label: str = "training"
    ) -> None:
        self._console = console
        self._trackers = trackers
        self._bar = bar
        self._started = time.monotonic()
        self._steps_before = loop.step
        self._task = bar.add_task(label, total=loop.total_steps, completed=loop.step, note="") if bar else None

    def report(self, loop: Loop) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        recent = loop.losses[-loop.config.training.log_every_steps :]
        loss, speed = sum(recent) / len(recent), loop.tokens_done / seconds
        memory = memory_in_use()
        self._trackers.log(
            loop.step, loss=loss, learning_rate=loop.learning_rate, tokens_per_second=speed, memory_bytes=memory
        )
        note = f"loss {loss:.4f}  lr {loop.learning_rate:.2e}  {speed:,.0f} tokens/s  {memory / 2**30:.2f} GiB"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=loop.step, note=note)
        else:
            left = seconds / max(1, loop.step - self._steps_before) * (loop.total_steps - loop.step)
            say(self._console, f"step {loop.step}/{loop.total_steps}  {note}  {duration(left)} left")

    def measured(self, loop: Loop) -> None:
        """Says the held-out loss that was measured last."""
        step, loss = loop.evaluations[-1]
        self._trackers.log(step, heldout_loss=loss)
        say(self._console, f"step {step}/{loop.total_steps}  held-out loss {loss:.4f}")


@contextmanager
def bars(console: Console) -> Iterator[Progress | None]:
    """What bars are drawn in, one for each Reporter; None where there is no terminal to draw on."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield bar


class Named(Console):
    """Another console, on which each line begins with a run's name: what is said where several runs speak."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__()
        self._other, self._name = console, name

    def print(self, *objects: Any, **options: Any) -> None:
        self._other.print(f"{self._name}:", *objects, **options)


def memory_in_use() -> int:
    """Bytes: of the GPU where there is one in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.memory_reserved()
    return psutil.Process().memory_info().rss


def duration(seconds: float) -> str:
    """Rounded to what one plans by: 45 s, 35 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def say(console: Console, text: str) -> None:
    """One line as it is: a path is neither wrapped nor read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
