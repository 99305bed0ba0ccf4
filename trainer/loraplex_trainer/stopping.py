"""Early stopping and the best step, from the held-out losses measured so far. Knows no torch and no files.

Both follow from the list alone, so a resumed run decides as the unbroken one would.
"""

from collections.abc import Sequence

from loraplex_trainer.sections import EarlyStopping

Evaluation = tuple[int, float]  # after how many steps, and the held-out loss then: mean nats per answer token


def is_best(evaluations: Sequence[Evaluation]) -> bool:
    """Whether the latest loss is the lowest; an equal one is not: the earlier step is kept."""
    *before, (_, latest) = evaluations
    return all(latest < loss for _, loss in before)


def should_stop(evaluations: Sequence[Evaluation], rule: EarlyStopping | None) -> bool:
    """Whether the last `patience` measurements each failed to go below the lowest so far by more than `min_delta`."""
    if rule is None:
        return False
    lowest, waited = float("inf"), 0
    for _, loss in evaluations:
        if loss < lowest - rule.min_delta:
            lowest, waited = loss, 0
        else:
            waited += 1
    return waited >= rule.patience
