"""Where a run writes, asked before any work: whether there is room for its folder, and nothing in it that is not ours.

Knows what a run leaves in an adapter's folder; makes nothing that stays.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loraplex_trainer.adapter import CONFIG, WEIGHTS
from loraplex_trainer.card import CARD
from loraplex_trainer.checkpoint import CHECKPOINT, PROGRESS, STATE
from loraplex_trainer.config import RunConfig
from loraplex_trainer.curve import FOLDER, PICTURE, TABLE
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.receipt import RECEIPT

_FILES = {WEIGHTS, CONFIG, CARD, RECEIPT}
_FOLDERS = {
    FOLDER: {TABLE, PICTURE},
    # the two others: a run was killed while it saved
    **{name: {PROGRESS, STATE} for name in (CHECKPOINT, f"{CHECKPOINT}.partial", f".{CHECKPOINT}.old")},
}
_NAMED = 3  # of the names that are in the way


def check_places(config: RunConfig) -> None:
    """Raises ConfigError for an output or logs that cannot be written to, and for a folder that is not the run's."""
    _check_writable("output", config.output, config.folder.parent)
    if config.report_to:
        _check_writable("logs", config.logs, config.logs)
        if config.logs.resolve().is_relative_to(config.folder.resolve()):
            raise ConfigError(f"logs: {config.logs} lies in {config.folder}, which is replaced when the run is done")
    if reason := in_the_way(config.folder):
        raise ConfigError(f"output: {reason}: move it away, or give this run another output or name")


def in_the_way(folder: Path) -> str | None:
    """Why an adapter may not take the place of what is at `folder`: it would be lost."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        what = "a link" if folder.is_symlink() else "a file"
        return f"{folder} is {what}, and the adapter's own folder is expected there"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} may not be written to"
    if not (names := sorted(_not_ours(folder))):
        return None
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{folder} is replaced by the adapter, and holds what no run has written: {', '.join(names[:_NAMED])}{more}"


def _not_ours(folder: Path) -> Iterator[str]:
    """A file called like one of ours is so only beside a receipt: without it nothing but a checkpoint was left."""
    is_adapter = (folder / RECEIPT).is_file()
    for path in folder.iterdir():
        if (names := _FOLDERS.get(path.name)) and path.is_dir() and not path.is_symlink():
            yield from (f"{path.name}/{inner.name}" for inner in path.iterdir() if inner.name not in names)
        elif not (is_adapter and path.name in _FILES):
            yield path.name


def _check_writable(key: str, given: Path, folder: Path) -> None:
    """By making `folder` in a scratch folder of the nearest place that is there."""
    folder = folder.absolute()
    try:
        nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        with tempfile.TemporaryDirectory(prefix=".loraplex-", dir=nearest) as scratch:
            (Path(scratch) / folder.relative_to(nearest)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{key}: {str(given)!r}: {reason}: a folder that can be written to is expected") from error
