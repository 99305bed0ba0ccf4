"""The loss of a run as a table and as a picture: `.training/loss.csv` and `.training/loss.png` in the adapter's folder.

A hidden folder: the registry takes it for no part of an adapter, so versions stay as small as they were.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loraplex_trainer.schedule import scheduled_rate
from loraplex_trainer.sections import TrainingSection
from loraplex_trainer.stopping import Evaluation

FOLDER, TABLE, PICTURE = ".training", "loss.csv", "loss.png"
FEWEST_POINTS = 10  # fewer losses make no curve


def write_curve(
    folder: Path,
    losses: Sequence[float],
    evaluations: Sequence[Evaluation],
    training: TrainingSection,
    total_steps: int,
) -> None:
    """Writes both into `folder`/.training; the picture only where there are enough steps for one."""
    place = folder / FOLDER
    place.mkdir()
    heldout = dict(evaluations)
    with (place / TABLE).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "loss", "learning_rate", "heldout_loss"])
        for step, loss in enumerate(losses, start=1):
            table.writerow([step, loss, scheduled_rate(step - 1, total_steps, training), heldout.get(step, "")])
    if len(losses) >= FEWEST_POINTS:
        _draw(place / PICTURE, losses, evaluations)


def _draw(path: Path, losses: Sequence[float], evaluations: Sequence[Evaluation]) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per answer token")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1, alpha=0.4, label="training, each step")
    axes.plot(range(1, len(losses) + 1), _smoothed(losses), linewidth=2, color="C0", label="training, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), marker="o", color="C1", label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Each step's mean over itself and the steps before it, as many as a twentieth of all."""
    window = max(1, len(losses) // 20)
    return [sum(losses[max(0, end - window) : end]) / min(window, end) for end in range(1, len(losses) + 1)]
