"""What runs must have in common to be trained together, read from their files. Knows no torch: it is said at once."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraplex_registry.base import HEADS
from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError


def check_together(files: Sequence[Path], configs: Sequence[RunConfig]) -> None:
    """Raises ConfigError for runs that cannot share a base; it names key, values and files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several run files are trained together by one process: start them without torchrun")
    first, *others = zip(files, configs, strict=True)
    for file, config in others:
        for (key, value), (_, theirs) in zip(_common(config), _common(first[1]), strict=True):
            if value != theirs:
                raise ConfigError(
                    f"{key}: {theirs!r} in {first[0]}, {value!r} in {file}: runs that are trained together share a base"
                )
    taken: dict[str, Path] = {}
    for file, config in zip(files, configs, strict=True):
        if config.name in taken:
            raise ConfigError(f"name: {config.name!r} in {taken[config.name]}, and in {file}: each run needs its own")
        taken[config.name] = file
        if one_at_a_time := [tracker for tracker in config.report_to if tracker != "tensorboard"]:
            raise ConfigError(
                f"report_to: {one_at_a_time[0]!r} in {file}: it follows one run at a time, and tensorboard several"
            )
        if heads := {*HEADS} & {*config.lora.target_modules} - {*config.lora.exclude_modules}:
            raise ConfigError(
                f"lora.target_modules: {heads.pop()!r} in {file}: the head is given the answers' tokens alone, so it "
                "cannot be adapted beside other runs: leave it out, or train them one after another"
            )
        if key := _of_one_alone(config):
            raise ConfigError(
                f"{key} in {file}: only plain LoRA on a causal base can be trained beside other runs, by one process"
            )


def _common(config: RunConfig) -> list[tuple[str, Any]]:
    """What all runs must say alike."""
    base = [(f"base.{key}", value) for key, value in config.base]
    training = [(f"training.{key}", getattr(config.training, key)) for key in ("kernels", "gradient_checkpointing")]
    return [*base, *training]


def _of_one_alone(config: RunConfig) -> str | None:
    """The first key whose value changes the base, or what all runs compute, or is no pair of matrices."""
    lora, strategy = config.lora, config.training.distributed.strategy
    found = [
        ("method", config.method, config.method != "lora"),
        ("base.task", config.base.task, config.base.task != "causal"),
        ("training.distributed.strategy", strategy, strategy != "ddp"),
        ("lora.init", lora.init, lora.init not in ("default", "gaussian")),
        ("lora.dora", lora.dora, lora.dora),
        ("lora.bias", lora.bias, lora.bias != "none"),
        ("lora.modules_to_save", list(lora.modules_to_save), bool(lora.modules_to_save)),
        ("lora.trainable_token_indices", list(lora.trainable_token_indices), bool(lora.trainable_token_indices)),
    ]
    return next((f"{key}: {value!r}" for key, value, refused in found if refused), None)
