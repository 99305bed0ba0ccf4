"""TensorBoard, wandb, trackio and MLflow, through accelerate's trackers: off unless asked for, off line unless told.

What a run says of itself is handed to each; none of them is imported where it is not asked for.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.identity import flat

PROJECT = "loraplex"


class Trackers:
    def __init__(self, trackers: list[GeneralTracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, **values: float) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=step)


def check_packages(config: RunConfig) -> None:
    """Raises ConfigError for a tracker that is not installed, with the command that installs it."""
    for name in config.report_to:
        if find_spec(name) is None:
            raise ConfigError(f"report_to: {name!r} is not installed: pip install 'loraplex[{name}]'")


@contextmanager
def tracking(config: RunConfig | None) -> Iterator[Trackers]:
    """The trackers of one run, told of its settings; closed at the end, whatever ends it. None: nothing is tracked."""
    if config is None or not config.report_to:
        yield Trackers([])
        return
    PartialState(cpu=config.base.device == "cpu")  # accelerate's logger asks for it
    trackers = [_tracker(name, config) for name in config.report_to]
    settings = {key: value if isinstance(value, int | float) else str(value) for key, value in _settings(config)}
    for tracker in trackers:
        tracker.start()
        tracker.store_init_configuration(settings)
    try:
        yield Trackers(trackers)
    finally:
        for tracker in trackers:
            tracker.finish()


def _settings(config: RunConfig) -> Iterable[tuple[str, object]]:
    return flat(config.model_dump(mode="json", exclude={"report_to", "logs"})).items()


def _tracker(name: str, config: RunConfig) -> GeneralTracker:
    config.logs.mkdir(parents=True, exist_ok=True)
    match name:
        case "tensorboard":
            return TensorBoardTracker(config.name, config.logs / "tensorboard")
        case "wandb":
            mode = os.environ.get("WANDB_MODE", "offline")
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            return WandBTracker(project, name=config.name, mode=mode, dir=config.logs)
        case "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(config.logs.resolve() / "trackio"))
            return TrackioTracker(PROJECT, name=config.name)
        case "mlflow":
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{config.logs.resolve()}/mlflow.db")
            return MLflowTracker(PROJECT, logging_dir=str(config.logs.resolve() / "mlflow"), run_name=config.name)
    raise AssertionError(name)
