"""Shows how a run goes: a bar on a terminal, one plain line every few steps in a log. Knows only the loop's numbers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraplex_trainer.loop import Loop


class Reporter:
    """Says loss, learning rate, tokens per second and the time left, each time it is asked to."""

    def __init__(self, console: Console, loop: Loop, bar: Progress | None) -> None:
        self._console = console
        self._bar = bar
        self._started = time.monotonic()
        self._steps_before = loop.step
        self._task = bar.add_task("training", total=loop.total_steps, completed=loop.step, note="") if bar else None

    def report(self, loop: Loop) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        recent = loop.losses[-loop.config.training.log_every_steps :]
        loss, speed = sum(recent) / len(recent), loop.tokens_done / seconds
        note = f"loss {loss:.4f}  lr {loop.learning_rate:.2e}  {speed:,.0f} tokens/s"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=loop.step, note=note)
        else:
            left = seconds / max(1, loop.step - self._steps_before) * (loop.total_steps - loop.step)
            say(self._console, f"step {loop.step}/{loop.total_steps}  {note}  {left:.0f} s left")


@contextmanager
def reporting(console: Console, loop: Loop) -> Iterator[Reporter]:
    """A Reporter for one loop; the bar is drawn only on a terminal."""
    if not console.is_terminal:
        yield Reporter(console, loop, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Reporter(console, loop, bar)


def duration(seconds: float) -> str:
    """Rounded to what one plans by: 45 s, 35 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def say(console: Console, text: str) -> None:
    """One line as it is: a path is neither wrapped nor read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
