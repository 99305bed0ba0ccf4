"""The LoRA adapter on a frozen base: made by peft, started from a parent's weights or from nothing, and written out.

Knows nothing of data or steps.
"""

import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loraplex_server.engine.model import Base
from loraplex_trainer.config import LoraSection
from loraplex_trainer.errors import ConfigError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach_adapter(base: Base, lora: LoraSection) -> PeftModel:
    """Freezes the base and puts a fresh adapter on it, in float32. Raises ConfigError for a target the base has not."""
    keep_quantized_layout(base.model)
    base.model.requires_grad_(False)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if isinstance(targets, list):
        _check_targets(targets, base.model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
    )
    model = get_peft_model(base.model, config)
    assert isinstance(model, PeftModel)
    return model


def trainable_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def keep_quantized_layout(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for the CPU at the first forward in eval mode.

    The repacked layout rounds the scales, and the backward pass and every later training step read it wrongly
    (Linear4bit.forward in bitsandbytes 0.50). Without it, training and evaluation take turns on the same bytes.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            quant_state = getattr(module.weight, "quant_state", None)
            assert not getattr(quant_state, "packing_format_for_cpu", False), "repacked before training"
            module.support_avx512bf16_for_cpu = False


def load_weights(model: PeftModel, folder: Path) -> None:
    """Starts from another adapter's weights; raises ConfigError unless it has the shape that the run file asks for."""
    try:
        theirs = load_file(folder / WEIGHTS)
        their_config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"continue_from: {folder}: {error}") from error
    ours, our_config = adapter_weights(model), adapter_config(model)
    for key, option in (("rank", "r"), ("alpha", "lora_alpha"), ("rslora", "use_rslora")):
        if their_config.get(option) != our_config[option]:
            raise ConfigError(
                f"lora.{key}: {our_config[option]}, but the adapter of continue_from has {their_config.get(option)}"
            )
    if {key: tensor.shape for key, tensor in theirs.items()} != {key: tensor.shape for key, tensor in ours.items()}:
        raise ConfigError(
            f"lora.target_modules: {', '.join(our_config['target_modules'])}, "
            f"but the adapter of continue_from has {their_config.get('target_modules')}, or is of another base"
        )
    set_peft_model_state_dict(model, theirs)


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """peft's own configuration, with its sets sorted: identical runs write identical bytes."""
    config: PeftConfig = model.peft_config["default"]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def save_adapter(model: PeftModel, folder: Path, base_id: str, revision: str | None) -> None:
    """Writes the weights and the configuration into an existing folder."""
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(model) | {
        "base_model_name_or_path": base_id,
        "revision": revision,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_targets(targets: list[str], model: torch.nn.Module) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(f"lora.target_modules: the base has no linear module {target!r}; it has {known}")
