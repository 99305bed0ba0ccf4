"""Option names of transformers, trl, peft and Axolotl: which of our keys each is, and what becomes of its value.

Tables first. Nothing is ignored in silence: an option is taken over, said to need no setting here, or refused with what
to do instead. Knows no files and no torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraplex_trainer.errors import ConfigError
from loraplex_trainer.fsdp_options import fsdp, fsdp_config

# Their name: our key, which takes the value over (through VALUES where that lists one).
RENAMED = {
    "base_model": "base.model",
    "model_name_or_path": "base.model",
    "model_name": "base.model",
    "model_id": "base.model",
    "model_revision": "base.revision",
    "revision_of_model": "base.revision",
    "dtype": "base.dtype",
    "torch_dtype": "base.dtype",
    "bnb_4bit_compute_dtype": "base.dtype",
    "bnb_4bit_quant_type": "base.quantization",
    "bnb_4bit_use_double_quant": "base.double_quantization",
    "device_map": "base.device_map",
    "train_file": "data.train",
    "dataset_name": "data.train",
    "packing": "data.packing",
    "sample_packing": "data.packing",
    "chat_template": "data.chat_template",
    "validation_file": "data.heldout",
    "max_seq_length": "data.max_tokens",
    "max_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "model_max_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "exclude_modules": "lora.exclude_modules",
    "layers_to_transform": "lora.layers_to_transform",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "rank_pattern": "lora.rank_pattern",
    "alpha_pattern": "lora.alpha_pattern",
    "use_rslora": "lora.rslora",
    "peft_use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "peft_use_dora": "lora.dora",
    "loraplus_lr_ratio": "lora.plus_ratio",
    "bias": "lora.bias",
    "modules_to_save": "lora.modules_to_save",
    "lora_modules_to_save": "lora.modules_to_save",
    "trainable_token_indices": "lora.trainable_token_indices",
    "peft_trainable_token_indices": "lora.trainable_token_indices",
    "feedforward_modules": "ia3.feedforward_modules",
    "num_virtual_tokens": "prompt.virtual_tokens",
    "prompt_tuning_init": "prompt.init",
    "prompt_tuning_init_text": "prompt.text",
    "prefix_projection": "prompt.projection",
    "encoder_reparameterization_type": "prompt.encoder",
    "encoder_hidden_size": "prompt.hidden_size",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "per_gpu_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation_steps",
    "optim": "training.optimizer",
    "optimizer": "training.optimizer",
    "learning_rate": "training.learning_rate",
    "adam_epsilon": "training.eps",
    "weight_decay": "training.weight_decay",
    "warmup_ratio": "training.warmup_ratio",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "seed": "training.seed",
    "logging_steps": "training.log_every_steps",
    "early_stopping_patience": "training.early_stopping.patience",
    "early_stopping_threshold": "training.early_stopping.min_delta",
    "output_dir": "output",
    "logging_dir": "logs",
}

# Of our keys that have their own words for a value.
VALUES: dict[str, dict[Any, str]] = {
    "base.dtype": {
        "bf16": "bfloat16",
        "torch.bfloat16": "bfloat16",
        "fp16": "float16",
        "torch.float16": "float16",
        "fp32": "float32",
        "torch.float32": "float32",
    },
    "prompt.init": {"SAMPLE_VOCAB": "vocabulary", "TEXT": "text", "RANDOM": "random"},
    "prompt.encoder": {"MLP": "mlp", "LSTM": "lstm"},
    "training.optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
    },
}

# Their name: what each value of it sets.
CHOICES: dict[str, tuple[tuple[Any, dict[str, Any]], ...]] = {
    "adapter": (("lora", {}), ("qlora", {"base.quantization": "nf4"})),
    "bf16": ((True, {"base.dtype": "bfloat16"}), (False, {}), ("auto", {})),
    "fp16": ((True, {"base.dtype": "float16"}), (False, {})),
    "load_best_model_at_end": ((True, {"training.keep": "best"}), (False, {})),
    "model_type": (("AutoModelForCausalLM", {}), ("AutoModelForSeq2SeqLM", {"base.task": "seq2seq"})),
    "peft_type": (
        ("LORA", {}),
        ("IA3", {"method": "ia3"}),
        ("PROMPT_TUNING", {"method": "prompt"}),
        ("PREFIX_TUNING", {"method": "prefix"}),
        ("P_TUNING", {"method": "p_tuning"}),
    ),
    "task_type": (("CAUSAL_LM", {}), ("SEQ_2_SEQ_LM", {"base.task": "seq2seq"})),
    "no_cuda": ((True, {"base.device": "cpu"}), (False, {})),
    "use_cpu": ((True, {"base.device": "cpu"}), (False, {})),
}

# Their name: the values that ask for what is done here anyway, and what that is.
AS_IT_IS: dict[str, tuple[Sequence[Any], str]] = {
    "lora_bias": (("none", False), "the adapter's matrices have no bias of their own"),
    "llm_int8_enable_fp32_cpu_offload": ((False,), "the whole base is on its GPUs"),
    "gradient_checkpointing_kwargs": (({"use_reentrant": False},), "checkpoints are not reentrant"),
    "activation_checkpointing_kwargs": (({"use_reentrant": False},), "checkpoints are not reentrant"),
    "completion_only_loss": ((True,), "the loss is on the completion alone"),
    "train_on_inputs": ((False,), "the loss is on the completion alone"),
    "dataloader_drop_last": ((False,), "every example is seen"),
    "dataset_num_proc": (range(1, 1000), "the examples are tokenized before the first step"),
    "dataloader_num_workers": (range(1000), "the examples are tokenized before the first step"),
    "dataloader_pin_memory": ((True, False), "the examples are tokenized before the first step"),
    "fsdp_version": ((1, 2), "torch's fully_shard, the second version, is what is used"),
    "ddp_find_unused_parameters": ((True, False), "only the adapter's gradients are exchanged"),
    "disable_tqdm": ((True, False), "a bar is drawn on a terminal only"),
    "do_eval": ((True,), "the held-out loss is always measured where data.heldout is set"),
    "do_train": ((True,), "that is what the command does"),
    "greater_is_better": ((False,), "the best step is the one with the lowest held-out loss"),
    "group_by_length": ((True, False), "examples of like length meet in a step, and the steps come in random order"),
    "label_smoothing_factor": ((0,), "labels are not smoothed"),
    "logging_strategy": (("steps",), "progress is told every training.log_every_steps"),
    "metric_for_best_model": (("loss", "eval_loss"), "the best step is the one with the lowest held-out loss"),
    "tokenizer_type": (("AutoTokenizer",), "the base's tokenizer_config.json says it"),
    "overwrite_output_dir": ((True,), "a finished adapter of the name is replaced when the new one is complete"),
    "push_to_hub": ((False,), "nothing is uploaded"),
    "remove_unused_columns": ((True, False), "the templates name the columns that are read"),
    "save_safetensors": ((True,), "nothing else is written"),
    "save_total_limit": (range(1, 1000), "one checkpoint is kept, to resume from"),
    "strict": ((True, False), "an unknown key always stops the start"),
    "torch_compile": ((False,), "nothing is compiled"),
    "trust_remote_code": ((False,), "no code of a checkpoint is run"),
}

# Their name: what to do instead.
INSTEAD = {
    "adapter": "LoRA (lora, qlora) is what is trained",
    "auto_find_batch_size": "set training.batch_size; `loraplex train --check` estimates the memory",
    "data_seed": "one seed, training.seed, decides everything",
    "dataset_text_field": "the name of a column is expected",
    "data_parallel": "it gathers all on GPU 0, and copies the base in each step: start one process a GPU with torchrun",
    "datasets": "list them under data.train, and say their form under data.form",
    "init_lora_weights": "lora.init is default, gaussian, orthogonal, pissa, olora or loftq",
    "peft_init_lora_weights": "lora.init is default, gaussian, orthogonal, pissa, olora or loftq",
    "lora_target_linear": "true is expected, or false where lora.target_modules names the modules",
    "llm_int8_threshold": "8-bit layers are multiplied dequantized, so that no activation is rounded",
    "model_type": "base.task is causal or seq2seq: AutoModelForCausalLM or AutoModelForSeq2SeqLM",
    "peft_type": "method is lora, ia3, prompt, prefix or p_tuning",
    "task_type": "base.task is causal or seq2seq: CAUSAL_LM or SEQ_2_SEQ_LM",
    "deepspeed": "the path of a JSON file is expected",
    "fsdp": "full_shard, auto_wrap and offload are understood; zero1 and zero2 of training.distributed share out less",
    "fsdp_config": "a mapping of options is expected",
    "eos_token": "the tokenizer's own is used: its tokenizer_config.json says it",
    "pad_token": "the tokenizer's own is used: its tokenizer_config.json says it",
    "padding_free": "set data.packing",
    "run_name": "set name: trackers call the run by it",
    "eval_batch_size": "held-out examples are measured in batches of training.batch_size",
    "per_device_eval_batch_size": "held-out examples are measured in batches of training.batch_size",
    "hub_model_id": "push the finished adapter: registry hub push NAME:N OWNER/REPO",
    "hub_token": "log in once with `hf auth login`",
    "token": "log in once with `hf auth login`",
    "lr_scheduler_kwargs": "{min_lr_rate: …}, {power: …} and, with restarts, {num_cycles: …} alone are understood, "
    "as training.min_lr_ratio, training.power and training.cycles",
    "neftune_noise_alpha": "noise on the embeddings is not to be had",
    "resume_from_checkpoint": "start the command with --resume",
    "save_strategy": "training.save_every is a number of steps, or epoch",
    "eval_strategy": "training.evaluate_every is a number of steps, or epoch",
    "evaluation_strategy": "training.evaluate_every is a number of steps, or epoch",
    "saves_per_epoch": "training.save_every is a number of steps, or epoch",
    "evals_per_epoch": "training.evaluate_every is a number of steps, or epoch",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "tf32": "not to be had: float32 is computed as such",
    "val_set_size": "put the held-out examples into a file of their own: data.heldout",
}

# A mapping of theirs whose entries are options in their own right.
NESTED = ("quantization_config", "bnb_config", "peft_config", "lora_config")

Settings = Mapping[str, Any]
Ours = dict[str, Any]  # our key: value


def is_theirs(name: str) -> bool:
    return any(name in table for table in (RENAMED, CHOICES, AS_IT_IS, COMPUTED, INSTEAD, NESTED))


def translate(settings: Settings) -> tuple[Ours, list[str]]:
    """Our keys and values for those options in `settings` that are theirs, and a line for each of these options.

    Raises ConfigError for an option that has no counterpart, with what to do instead, and for two that disagree.
    """
    flat = {name: value for name, value in settings.items() if is_theirs(name) and name not in NESTED}
    for name in NESTED:
        inner = settings.get(name) or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{name}: {_text(inner)}: a mapping of options is expected")
        flat |= inner
    theirs = {name: value for name, value in flat.items() if value is not None}
    beside = {name: value for name, value in settings.items() if value is not None} | theirs
    ours: Ours = {}
    said_by: dict[str, str] = {}
    lines = [f"{name}: empty, as if it were not there" for name in flat if name not in theirs]
    for name, value in theirs.items():
        if not is_theirs(name) or name in NESTED:
            raise ConfigError(f"{name}: an unknown option in {' or '.join(n for n in NESTED if n in settings)}")
        taken = _take(name, value, beside)
        for key, new in taken.items():
            if key in ours and ours[key] != new:
                raise ConfigError(f"{said_by[key]} and {name} both set {key}, to {ours[key]!r} and {new!r}: keep one")
            ours.setdefault(key, new)
            said_by.setdefault(key, name)
        lines.append(_line(name, value, taken))
    return ours, lines


def _take(name: str, value: Any, theirs: Settings) -> Ours:
    """What one option becomes; nothing where it asks for what is done anyway."""
    for chosen, ours in CHOICES.get(name, ()):
        if _is(value, chosen):
            return ours
    if name in COMPUTED and (ours := COMPUTED[name](value, theirs)) is not None:
        return ours
    if name in RENAMED:
        key = RENAMED[name]
        return {key: VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value}
    values, reason = AS_IT_IS.get(name, ((), INSTEAD.get(name, "true or false is expected")))
    if any(_is(value, done) for done in values):
        return {}
    raise ConfigError(f"{name}: {json.dumps(value, ensure_ascii=False, default=str)}: not to be had: {reason}")


def _is(value: Any, choice: Any) -> bool:
    """Neither 1 nor "true" is true."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _line(name: str, value: Any, ours: Ours) -> str:
    """`old -> key` where the value stays, `old: value -> key: value` where it does not."""
    if not ours:
        return f"{name}: {_text(value)}: needs no setting" + (f": {AS_IT_IS[name][1]}" if name in AS_IT_IS else "")
    if list(ours.values()) == [value]:
        return f"{name} -> {next(iter(ours))}"
    return f"{name}: {_text(value)} -> " + ", ".join(f"{key}: {_text(new)}" for key, new in ours.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _quantization(scheme: str, other: str) -> Callable[[Any, Settings], Ours | None]:
    """`load_in_4bit` and `load_in_8bit`: neither means a base that is not quantized, unless something else says so."""

    def choose(wanted: Any, theirs: Settings) -> Ours | None:
        if wanted is True:
            return {"base.quantization": theirs.get("bnb_4bit_quant_type", scheme) if scheme == "nf4" else scheme}
        if wanted is not False:
            return None
        return {} if theirs.get(other) is True or theirs.get("adapter") == "qlora" else {"base.quantization": "none"}

    return choose


def _strategy(key: str, steps: str, *, never: Ours | None = None) -> Callable[[Any, Settings], Ours | None]:
    """When to save or to measure: "epoch", "steps" with their number in the option `steps`, or "no"."""

    def choose(chosen: Any, theirs: Settings) -> Ours | None:
        if chosen == "epoch":
            return {key: "epoch"}
        if chosen == "steps":
            return {} if steps in theirs else None
        return never if chosen == "no" or chosen is False else None  # YAML reads a bare no as false

    return choose


def _steps(key: str, *strategies: str) -> Callable[[Any, Settings], Ours | None]:
    """A number of steps; beside a strategy that goes by something else it is without effect with them too."""
    return lambda steps, theirs: {key: steps} if all(theirs.get(s, "steps") == "steps" for s in strategies) else {}


def _init(start: Any, _: Settings) -> Ours | None:
    """peft's `pissa_niter_16` says how often PiSSA's decomposition is refined: that is as often here anyway."""
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        return {"lora.init": "pissa"}
    return None if start is False else {"lora.init": "default" if start is True else start}


def _targets(modules: Any, theirs: Settings) -> Ours:
    return {f"{'ia3' if theirs.get('peft_type') == 'IA3' else 'lora'}.target_modules": modules}


def _target_linear(wanted: Any, theirs: Settings) -> Ours | None:
    """Every linear module; false is nothing to do where the modules are named, for without names it is all of them."""
    section = theirs.get("lora")
    ours = section.get("target_modules") if isinstance(section, Mapping) else theirs.get("lora.target_modules")
    named = theirs.get("lora_target_modules") or theirs.get("target_modules") or ours
    if wanted is False and named not in (None, [], "all-linear"):
        return {}
    return {"lora.target_modules": "all-linear"} if wanted is True else None


def _betas(_: Any, theirs: Settings) -> Ours:
    return {"training.betas": [theirs.get("adam_beta1", 0.9), theirs.get("adam_beta2", 0.999)]}


def _schedule(schedule: Any, theirs: Settings) -> Ours:
    """Their `constant` has no warm-up, where ours has the default one."""
    if schedule == "constant" and not {"warmup_ratio", "warmup_steps"} & theirs.keys():
        return {"training.schedule": schedule, "training.warmup_ratio": 0.0}
    return {"training.schedule": schedule}


def _warmup(steps: Any, theirs: Settings) -> Ours:
    """transformers 5 takes a share of the steps here too: a number below 1. Zero leaves the word to `warmup_ratio`."""
    if steps == 0 and "warmup_ratio" in theirs:
        return {}
    key = "training.warmup_ratio" if isinstance(steps, float) and steps < 1 else "training.warmup_steps"
    return {key: steps}


def _scheduler_options(options: Any, theirs: Settings) -> Ours | None:
    """`num_cycles` is another thing to their plain `cosine`: how many waves, up again too."""
    known = {"min_lr_rate": "training.min_lr_ratio", "power": "training.power"}
    if "cosine_with_restarts" in (theirs.get("lr_scheduler_type"), theirs.get("lr_scheduler")):
        known["num_cycles"] = "training.cycles"
    if not isinstance(options, Mapping) or len(options) != 1:
        return None
    ((key, value),) = options.items()
    return {known[key]: value} if key in known else None


# Their name: our keys, from the value and their other options; None for a value that is not understood.
COMPUTED: dict[str, Callable[[Any, Settings], Ours | None]] = {
    "adam_beta1": _betas,
    "adam_beta2": _betas,
    "dataset_text_field": lambda name, _: {"data.form": "text", "data.column": name} if isinstance(name, str) else None,
    "deepspeed": lambda path, _: {"training.distributed.deepspeed": path} if isinstance(path, str) else None,
    "fsdp": fsdp,
    "fsdp_config": fsdp_config,
    "cosine_min_lr_ratio": lambda ratio, _: {"training.schedule": "cosine_with_min_lr", "training.min_lr_ratio": ratio},
    "eval_strategy": _strategy("training.evaluate_every", "eval_steps", never={}),
    "evaluation_strategy": _strategy("training.evaluate_every", "eval_steps", never={}),
    "eval_steps": _steps("training.evaluate_every", "eval_strategy", "evaluation_strategy"),
    "save_strategy": _strategy("training.save_every", "save_steps"),
    "save_steps": _steps("training.save_every", "save_strategy"),
    "init_lora_weights": _init,
    "peft_init_lora_weights": _init,
    "target_modules": _targets,
    "load_in_4bit": _quantization("nf4", "load_in_8bit"),
    "load_in_8bit": _quantization("int8", "load_in_4bit"),
    "lora_target_linear": _target_linear,
    "lr_scheduler_kwargs": _scheduler_options,
    "lr_scheduler": _schedule,
    "lr_scheduler_type": _schedule,
    "max_grad_norm": lambda norm, _: {"training.max_grad_norm": None if _is(norm, 0) else norm},
    "max_steps": lambda steps, _: {} if steps == -1 else {"training.max_steps": steps},
    "warmup_steps": _warmup,
}
