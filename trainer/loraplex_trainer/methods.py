"""peft's configuration of an adapter from the run file's: LoRA, IA³ and the methods that put vectors before the prompt.

Knows a base's modules by name, to refuse what it has not; trains and saves nothing.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from transformers.pytorch_utils import Conv1D

from loraplex_server.engine.model import Base
from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.sections import Ia3Section, LoraSection, PromptSection

TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
_INITS = {"vocabulary": PromptTuningInit.SAMPLE_VOCAB, "text": PromptTuningInit.TEXT, "random": PromptTuningInit.RANDOM}


def other_config(config: RunConfig, base: Base) -> PeftConfig:
    """What peft makes an adapter of another method than LoRA from. Raises ConfigError for what the base has not."""
    task_type = TASK_TYPES[config.base.task]
    if config.method == "ia3":
        return _ia3_config(config.ia3, base.model, task_type)
    return _prompt_config(config.method, config.prompt, base.id, task_type)


def lora_config(lora: LoraSection, model: Any, task: str = "causal") -> LoraConfig:
    """Its own starts (PiSSA, OLoRA, LoftQ, orthogonal) come later, see initial.py: to peft they are plain adapters."""
    linear = linear_modules(model)
    for key in ("target_modules", "exclude_modules"):
        names = getattr(lora, key)
        _check_names(f"lora.{key}", () if isinstance(names, str) else names, linear)
    _check_ranks(lora, max(_smaller_side(model.get_submodule(name)) for name in linear))
    if lora.bias != "none" and model.dtype != torch.float32:
        raise ConfigError(
            f"lora.bias: {lora.bias!r} trains the base's own biases, which are kept in {_name(model.dtype)} here: "
            "set base.dtype to float32"
        )
    for name in lora.modules_to_save:
        _check_module_to_save(name, model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if beyond := [index for index in lora.trainable_token_indices if index >= vocabulary]:
        raise ConfigError(f"lora.trainable_token_indices: {beyond[0]}: the base has {vocabulary} tokens")
    targets: str | list[str] = lora.target_modules if isinstance(lora.target_modules, str) else [*lora.target_modules]
    if lora.layers_to_transform and targets == "all-linear":  # peft picks layers only where modules are named
        head = model.get_output_embeddings()
        targets = sorted({name.rpartition(".")[2] for name in linear if model.get_submodule(name) is not head})
    return LoraConfig(
        task_type=TASK_TYPES[task],
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=list(lora.exclude_modules) or None,
        layers_to_transform=list(lora.layers_to_transform) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=list(lora.trainable_token_indices) or None,
    )


def refuse_unused(lora: LoraSection, adapted: Iterable[str]) -> None:
    """Raises ConfigError for a pattern or a layer that is that of no adapted module: peft only warns."""
    paths = list(adapted)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):  # as peft's get_pattern_key
                raise ConfigError(f"lora.{key}: {pattern!r} is no adapted module; there are {_leaves(paths)}")
    layers = {int(part) for path in paths for part in path.split(".") if part.isdigit()}
    if beyond := [layer for layer in lora.layers_to_transform if layer not in layers]:
        raise ConfigError(f"lora.layers_to_transform: {beyond[0]}: the base has no such layer to adapt")


def linear_modules(model: torch.nn.Module) -> list[str]:
    """Paths of the modules that LoRA and IA³ can adapt."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def _ia3_config(ia3: Ia3Section, model: Any, task_type: str) -> IA3Config:
    """Without targets, those that peft knows for the architecture: keys, values and the way out of the MLP."""
    linear = linear_modules(model)
    architecture = model.config.model_type
    if ia3.target_modules is None and architecture not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise ConfigError(
            f"ia3.target_modules: none are known for {architecture!r}: name those of keys, values and the way out of "
            f"the MLP; there are {_leaves(linear)}"
        )
    _check_names("ia3.target_modules", ia3.target_modules or (), linear)
    if stray := set(ia3.feedforward_modules or ()) - set(ia3.target_modules or ()):
        raise ConfigError(f"ia3.feedforward_modules: {min(stray)!r} is not one of ia3.target_modules")
    targets = None if ia3.target_modules is None else list(ia3.target_modules)
    feedforward = [] if ia3.feedforward_modules is None else list(ia3.feedforward_modules)
    return IA3Config(
        task_type=task_type, target_modules=targets, feedforward_modules=None if targets is None else feedforward
    )


def _prompt_config(method: str, prompt: PromptSection, base_id: str, task_type: str) -> PeftConfig:
    options: dict[str, Any] = {"task_type": task_type, "num_virtual_tokens": prompt.virtual_tokens}
    if method == "prompt":
        options["prompt_tuning_init"] = _INITS[prompt.init]
        if prompt.text is not None:
            options |= {"prompt_tuning_init_text": prompt.text, "tokenizer_name_or_path": base_id}
        return PromptTuningConfig(**options)
    options["encoder_hidden_size"] = prompt.hidden_size
    if method == "prefix":
        return PrefixTuningConfig(**options, prefix_projection=prompt.projection)
    return PromptEncoderConfig(**options, encoder_reparameterization_type=prompt.encoder.upper())


def _check_names(key: str, names: Iterable[str], linear: list[str]) -> None:
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in linear):
            raise ConfigError(f"{key}: the base has no linear module {wanted!r}; it has {_leaves(linear)}")


def _check_ranks(lora: LoraSection, most: int) -> None:
    """Before peft makes matrices that may fill the memory."""
    given = {"lora.rank": lora.rank, **{f"lora.rank_pattern.{name}": rank for name, rank in lora.rank_pattern.items()}}
    for key, rank in given.items():
        if rank > most:
            raise ConfigError(
                f"{key}: {rank}: no weight of the base has a higher rank than {most}, so an adapter has no use for "
                f"one: at most {most} is expected"
            )


def _smaller_side(module: Any) -> int:
    """Of a weight, whose rank is no higher."""
    return min(module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features))


def _check_module_to_save(wanted: str, model: torch.nn.Module) -> None:
    found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{wanted}")]
    if not found:
        raise ConfigError(f"lora.modules_to_save: the base has no module {wanted!r}")
    if any(isinstance(part, Linear4bit | Linear8bitLt) for module in found for part in module.modules()):
        raise ConfigError(f"lora.modules_to_save: {wanted!r} is quantized, so it cannot be trained whole")


def _leaves(paths: Iterable[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
