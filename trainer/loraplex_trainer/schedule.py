"""How many steps a run has, and the learning rate of each, from its number alone.

Pure arithmetic: a resumed run needs no state of this file.
"""

import math

from loraplex_trainer.sections import TrainingSection


def count_steps(training: TrainingSection, steps_per_epoch: int) -> int:
    return training.max_steps or math.ceil(training.epochs * steps_per_epoch)


def scheduled_rate(step: int, total_steps: int, training: TrainingSection) -> float:
    """Linear warm-up, then the schedule: down to zero, to `min_lr_ratio` of the highest rate, or not at all.

    `step` counts from 0. The names are transformers' (`transformers.optimization.get_scheduler`).
    """
    warmup_steps = warmup_length(total_steps, training)
    if step < warmup_steps:
        return training.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)  # 0 … below 1
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    match training.schedule:
        case "constant" | "constant_with_warmup":
            factor = 1.0
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = cosine
        case "cosine_with_min_lr":
            factor = training.min_lr_ratio + (1.0 - training.min_lr_ratio) * cosine
        case "cosine_with_restarts":
            factor = 0.5 * (1.0 + math.cos(math.pi * (training.cycles * done % 1.0)))
        case "polynomial":
            factor = (1.0 - done) ** training.power
        case "inverse_sqrt":
            timescale = warmup_steps or 10_000  # as transformers has it
            factor = math.sqrt(timescale / (step - warmup_steps + timescale))
    return training.learning_rate * factor


def warmup_length(total_steps: int, training: TrainingSection) -> int:
    """Steps in which the rate rises; at most all of them."""
    if training.warmup_steps is not None:
        return min(training.warmup_steps, total_steps)
    return math.ceil(training.warmup_ratio * total_steps)
