"""A DeepSpeed JSON file, as users of transformers have it: which values are keys of ours, and what the engine is told.

Tables first. A value "auto" is ours to fill. Nothing is ignored in silence: a value becomes a key of the run file, is
handed to the engine, is said to need no setting, or is refused. Knows no torch, and not DeepSpeed itself.
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_trainer.errors import ConfigError

if TYPE_CHECKING:
    from loraplex_trainer.sections import TrainingSection

AUTO = "auto"
Ours = tuple[str, str, Any]  # what the file says, our key, and its value

# Keys that the engine is handed as they are.
FOR_THE_ENGINE = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "disable_allgather",
    "dump_state",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
)

# Of `zero_optimization`: what is about memory and speed, and changes no number.
OF_ZERO = (
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "elastic_checkpoint",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)

# What "auto" stands for there, from the base's width, as transformers has it.
AUTO_SIZES: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}

# Keys without effect here, and why.
NEEDS_NO_SETTING = {
    "activation_checkpointing": "it is for models that call DeepSpeed's own checkpointing",
    "aio": "nothing is offloaded to a disk",
    "zero_allow_untested_optimizer": "the optimizer is the one of the run file",
    "zero_force_ds_cpu_optimizer": "the optimizer is the one of the run file",
}

# Keys that are taken where they are switched off, and what to do instead of switching them on.
ONLY_OFF = {
    "amp": "set base.dtype",
    "autotuning": "set the sizes yourself",
    "comet": "set report_to",
    "compression_training": "only an adapter is trained",
    "csv_monitor": "the losses of a run are in .training/loss.csv",
    "curriculum_learning": "the order of the examples is drawn by training.seed",
    "data_efficiency": "the order of the examples is drawn by training.seed",
    "elasticity": "a run can be resumed with another number of processes",
    "flops_profiler": "`loraplex train --check` tells tokens per second",
    "sparse_gradients": "an adapter's gradients are dense",
    "tensorboard": "set report_to: [tensorboard]",
    "wandb": "set report_to: [wandb]",
}

OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}
# Of `optimizer.params`: our key; and those that must be as they are here.
OF_OPTIMIZER = {
    "lr": "training.learning_rate",
    "betas": "training.betas",
    "eps": "training.eps",
    "weight_decay": "training.weight_decay",
    "momentum": "training.momentum",
}
FIXED_IN_OPTIMIZER = {
    "adam_w_mode": (True,),
    "amsgrad": (False,),
    "bias_correction": (True,),
    "dampening": (0,),
    "nesterov": (False,),
    "torch_adam": (True, False),
}
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine_with_min_lr"}
OF_SCHEDULER = {
    "warmup_num_steps": "training.warmup_steps",
    "warmup_max_lr": "training.learning_rate",
    "cos_min_ratio": "training.min_lr_ratio",
}
FIXED_IN_SCHEDULER = {"warmup_min_lr": (0,), "warmup_min_ratio": (0,), "warmup_type": ("linear",)}


def read_deepspeed(path: Path) -> dict[str, Any]:
    """The file's content; raises ConfigError for one that is not there, or no JSON object."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"training.distributed.deepspeed: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"training.distributed.deepspeed: {path}: not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"training.distributed.deepspeed: {path}: a mapping of keys to values is expected")
    return given


def additions(settings: Mapping[str, Any], processes: int, tell: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
    """Keys of ours, and their values, that the DeepSpeed file which `settings` name adds; `tell` is told of each.

    Raises ConfigError for a value that says something else than the run file does, and for one that is not to be had.
    """
    path = _look_up(settings, "training.distributed.deepspeed")
    if not isinstance(path, str):  # none, or what the run file's own rules refuse
        return
    taken: dict[str, Any] = {}
    given_there = read_deepspeed(Path(path))
    try:
        ours, lines = taken_over(given_there, processes)
        for said, key, value in ours:
            there = taken.setdefault(key, value)
            if there != value:
                raise ConfigError(f"{said}: the file sets {key} to {_text(there)} too: keep one")
            given = _look_up(settings, key)
            if given not in (None, value):
                raise ConfigError(f'{said}: but {key} is {_text(given)}: expected the same, or "auto"')
            lines.append(f"{said} -> {key}: {_text(value)}")
    except ConfigError as error:
        raise ConfigError(f"training.distributed.deepspeed: {path}: {error}") from error
    for line in lines:
        tell(f"{path}: {line}")
    yield from taken.items()


def taken_over(given: Mapping[str, Any], processes: int) -> tuple[list[Ours], list[str]]:
    """What of the file are keys of ours, and a line for each value that needs no setting. Raises ConfigError."""
    known = (*FOR_THE_ENGINE, *NEEDS_NO_SETTING, *ONLY_OFF, *_SECTIONS, *_BATCH)
    lines = []
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{key}: {_text(value)}: an unknown key{_nearest(key, known)}")
        if key in NEEDS_NO_SETTING:
            lines.append(f"{key}: needs no setting: {NEEDS_NO_SETTING[key]}")
        if key in ONLY_OFF and value and not (isinstance(value, Mapping) and value.get("enabled", False) is False):
            raise ConfigError(f"{key}: {_text(value)}: not to be had: {ONLY_OFF[key]}")
    ours = [*_batches(given, processes)]
    for key, read in _SECTIONS.items():
        if (value := given.get(key, AUTO)) not in (AUTO, None):
            ours += read(value)
    return ours, lines


def engine_settings(given: Mapping[str, Any], training: "TrainingSection", width: int) -> dict[str, Any]:
    """What the engine is handed. `width` is the base's hidden size.

    Accumulation is ours: the engine is told that there may be some, and before each backward whether a step is due.
    """
    passed = {key: value for key, value in given.items() if key in FOR_THE_ENGINE}
    zero = {
        key: AUTO_SIZES[key](width) if value == AUTO else value
        for key, value in passed.get("zero_optimization", {}).items()
        if value != AUTO or key in AUTO_SIZES
    }
    stage = int(training.distributed.strategy.removeprefix("zero"))
    if not given:
        zero = {name: size(width) for name, size in AUTO_SIZES.items() if stage == 3}
        offloads = ("offload_optimizer", "offload_param")[: 2 if stage == 3 else 1]
        zero |= {kind: {"device": "cpu"} for kind in offloads if training.distributed.offload == "cpu"}
    return {
        "steps_per_print": sys.maxsize,
        **passed,
        "zero_optimization": {**zero, "stage": stage},
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _batches(given: Mapping[str, Any], processes: int) -> Iterator[Ours]:
    """Two of the three sizes say the third. Ours are of a whole step, DeepSpeed's accumulation of one process."""
    total, micro, accumulation = (None if given.get(key) == AUTO else given.get(key) for key in _BATCH)
    for key, value in zip(_BATCH, (total, micro, accumulation), strict=True):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f'{key}: {_text(value)}: expected a whole number above 0, or "auto"')
    if micro is not None:
        yield f"{_BATCH[1]}: {micro}", "training.batch_size", micro
    if accumulation is not None:
        said = f"{_BATCH[2]}: {accumulation}, in each of {processes} processes"
        yield said, "training.accumulation_steps", accumulation * processes
    if total is None:
        return
    known = (micro or 1) * (accumulation or 1) * processes
    if total % known or (micro and accumulation and total != known):
        of = " × ".join(str(number) for number in (micro, accumulation) if number)
        raise ConfigError(
            f"{_BATCH[0]}: {total}: expected {of + ' × ' if of else ''}{processes} processes"
            f"{'' if micro and accumulation else ' to divide it'}"
        )
    said = f"{_BATCH[0]}: {total}"
    if micro is None:
        yield said, "training.batch_size", total // known
    if accumulation is None:
        yield said, "training.accumulation_steps", processes * (total // known if micro else 1)


def _clipping(norm: Any) -> Iterator[Ours]:
    yield f"gradient_clipping: {_text(norm)}", "training.max_grad_norm", norm or None


def _zero(zero: Any) -> Iterator[Ours]:
    _known("zero_optimization", zero, OF_ZERO)
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage: {_text(stage)}: expected 0, 1, 2 or 3")
    strategy = f"zero{stage}" if stage else "ddp"
    yield f"zero_optimization.stage: {stage}", "training.distributed.strategy", strategy
    offloaded = False
    for key in ("offload_optimizer", "offload_param"):
        device = _mapping(f"zero_optimization.{key}", zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"zero_optimization.{key}.device: {_text(device)}: expected none or cpu")
        if device == "cpu" and stage < (1 if key == "offload_optimizer" else 3):
            raise ConfigError(f'zero_optimization.{key}.device: "cpu": stage {stage} has nothing to offload there')
        offloaded = offloaded or device == "cpu"
    if offloaded:
        yield "zero_optimization: offload to the cpu", "training.distributed.offload", "cpu"


def _optimizer(optimizer: Any) -> Iterator[Ours]:
    _known("optimizer", optimizer, ("type", "params", "legacy_fusion"))
    kind = optimizer.get("type", AUTO)
    if kind != AUTO:
        if str(kind).lower() not in OPTIMIZERS:
            raise ConfigError(f"optimizer.type: {_text(kind)}: expected Adam, AdamW or SGD")
        yield f"optimizer.type: {kind}", "training.optimizer", OPTIMIZERS[str(kind).lower()]
    yield from _options("optimizer.params", optimizer.get("params") or {}, OF_OPTIMIZER, FIXED_IN_OPTIMIZER)


def _scheduler(scheduler: Any) -> Iterator[Ours]:
    _known("scheduler", scheduler, ("type", "params"))
    kind, options = scheduler.get("type", AUTO), _mapping("scheduler.params", scheduler.get("params") or {})
    if kind != AUTO:
        if not isinstance(kind, str) or kind not in SCHEDULES:
            raise ConfigError(f"scheduler.type: {_text(kind)}: expected {', '.join(SCHEDULES)}")
        # DeepSpeed's own warm-up is logarithmic unless warmup_type says otherwise; transformers' is not.
        said = f"scheduler.type: {kind}" + ("" if "warmup_type" in options else ", with a linear warm-up")
        yield said, "training.schedule", SCHEDULES[kind]
    if options.get("total_num_steps", AUTO) != AUTO:
        said = f"scheduler.params.total_num_steps: {_text(options['total_num_steps'])}"
        raise ConfigError(
            f'{said}: expected "auto": the schedule ends with the run (training.max_steps, training.epochs)'
        )
    rest = {key: value for key, value in options.items() if key != "total_num_steps"}
    yield from _options("scheduler.params", rest, OF_SCHEDULER, FIXED_IN_SCHEDULER)


def _dtype(name: str, dtype: str) -> Callable[[Any], Iterator[Ours]]:
    """`fp16` and `bf16`: what the base computes in. The adapter stays in float32, so no loss needs scaling."""

    def read(section: Any) -> Iterator[Ours]:
        enabled = section.get("enabled", False) if isinstance(section, Mapping) else section
        if not isinstance(enabled, bool) and enabled != AUTO:
            raise ConfigError(f'{name}.enabled: {_text(enabled)}: expected true, false or "auto"')
        if enabled is True:
            yield f"{name}.enabled: true", "base.dtype", dtype

    return read


def _options(where: str, options: Any, ours: Mapping[str, str], fixed: Mapping[str, tuple[Any, ...]]) -> Iterator[Ours]:
    _known(where, options, (*ours, *fixed))
    for key, value in options.items():
        if value == AUTO:
            continue
        if key in ours:
            yield f"{where}.{key}: {_text(value)}", ours[key], value
        elif value not in fixed[key]:
            expected = " or ".join(_text(choice) for choice in (*fixed[key], AUTO))
            raise ConfigError(f"{where}.{key}: {_text(value)}: expected {expected}")


def _known(where: str, section: Any, known: tuple[str, ...]) -> None:
    for key, value in _mapping(where, section).items():
        if key not in known:
            raise ConfigError(f"{where}.{key}: {_text(value)}: not to be had, or unknown{_nearest(key, known)}")


def _mapping(where: str, section: Any) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: {_text(section)}: a mapping of keys to values is expected")
    return section


def _nearest(key: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; the nearest known key is {near[0]!r}" if near else ""


def _look_up(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SECTIONS: dict[str, Callable[[Any], Iterator[Ours]]] = {
    "zero_optimization": _zero,
    "gradient_clipping": _clipping,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "fp16": _dtype("fp16", "float16"),
    "bf16": _dtype("bf16", "bfloat16"),
}
