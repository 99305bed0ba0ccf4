"""The adapter on a frozen base: made by peft, started from a parent's weights or from nothing, and written out.

Knows nothing of data or steps.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.ia3 import IA3Layer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loraplex_server.engine.int8 import compute_in_float32
from loraplex_server.engine.model import Base
from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.initial import as_one, begin, config_as_one, lora_layers
from loraplex_trainer.methods import lora_config, other_config, refuse_unused
from loraplex_trainer.sections import LoraSection

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "default"  # peft's name of an adapter that is alone
# What an adapter and the one it continues must have in common, by the run file's names and peft's.
_SHARED = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "bias": "bias",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
}


def attach(base: Base, config: RunConfig) -> PeftModel:
    """Freezes the base and puts a fresh adapter on it, of any method. Raises ConfigError for what the base has not."""
    if config.method == "lora":
        model = attach_adapter(base, config.lora, config.base.task)
    else:
        model = _on_frozen(base, other_config(config, base), config.method)
        keep_dtype(model)
    if config.training.gradient_checkpointing:
        checkpoint_activations(base)
    return model


def checkpoint_activations(base: Base, **options: Any) -> None:
    """Lets layers be computed again for their gradients, instead of kept. `options` are torch's checkpoint's."""
    base.model.activation_checkpointing_enable({"use_reentrant": False, **options})
    base.model.disable_input_require_grads()  # only reentrant checkpoints need inputs with gradients


def attach_adapter(base: Base, lora: LoraSection, task: str = "causal") -> PeftModel:
    """The same for LoRA alone, in float32."""
    compute = base.dtype
    model = _on_frozen(base, lora_config(lora, base.model, task), "lora")
    refuse_unused(lora, [path for path, _ in lora_layers(model)])
    begin(model, lora.init, base)
    raise_copies(model, compute)
    return model


def raise_copies(model: PeftModel, compute: torch.dtype) -> None:
    """To float32, modules that are trained whole: peft raises what is its own, and leaves copies of the base's."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and compute != torch.float32:
            compute_in_float32(module.modules_to_save["default"], gives=compute)


def _on_frozen(base: Base, config: PeftConfig, method: str) -> PeftModel:
    freeze(base)
    with in_our_words(method):
        model = get_peft_model(base.model, config)
    assert isinstance(model, PeftModel)
    return model


def freeze(base: Base) -> None:
    """Before the first adapter."""
    keep_quantized_layout(base.model)
    base.model.requires_grad_(False)


@contextmanager
def in_our_words(method: str) -> Iterator[None]:
    """Raises ConfigError for what peft refuses: no module is left, or two options exclude each other."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)  # see refuse_unused
            yield
    except ValueError as error:
        raise ConfigError(f"{method}: {error}") from error


def trainable_parameters(model: PeftModel, adapter: str = ADAPTER) -> dict[str, torch.nn.Parameter]:
    """By names in which every adapter is called as one that is alone: checkpoints do not tell who was beside it."""
    others = [f".{name}." for name in model.peft_config if name != adapter]
    return {
        name.replace(f".{adapter}.", f".{ADAPTER}."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(other in name for other in others)
    }


def rate_groups(
    parameters: dict[str, torch.nn.Parameter], plus_ratio: float
) -> tuple[dict[str, torch.nn.Parameter], list[dict[str, Any]]]:
    """The parameters in an optimizer's order, and its groups: `times` is how many times the rate a group learns at.

    LoRA+ (arXiv:2402.12354): B matrices learn faster than A matrices.
    """
    fast = {name: parameter for name, parameter in parameters.items() if plus_ratio != 1 and ".lora_B." in name}
    slow = {name: parameter for name, parameter in parameters.items() if name not in fast}
    groups = [{"params": list(group.values()), "times": times} for group, times in ((slow, 1), (fast, plus_ratio))]
    return slow | fast, [group for group in groups if group["params"]]


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


def keep_dtype(model: torch.nn.Module) -> None:
    """Lets IA³'s layers give the dtype they are given, as peft's do on a base that is not quantized.

    On a quantized one they give their vectors' float32, which attention does not take beside a 16-bit query.
    """
    for module in model.modules():
        if isinstance(module, IA3Layer):
            module.register_forward_hook(_give_as_given)


def _give_as_given(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return out.to(inputs[0].dtype)


def load_weights(model: PeftModel, folder: Path, adapter: str = ADAPTER) -> None:
    """Starts from another adapter's weights; raises ConfigError unless it has the shape that the run file asks for."""
    try:
        theirs = load_file(folder / WEIGHTS)
        their_config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"continue_from: {folder}: {error}") from error
    ours, our_config = adapter_weights(model, adapter), adapter_config(model, adapter)
    for key, option in _SHARED.items():
        if (their_config.get(option) or None) != (our_config[option] or None):
            raise ConfigError(
                f"lora.{key}: {our_config[option]}, but the adapter of continue_from has {their_config.get(option)}"
            )
    if {key: tensor.shape for key, tensor in theirs.items()} != {key: tensor.shape for key, tensor in ours.items()}:
        raise ConfigError(
            f"lora.target_modules: {', '.join(our_config['target_modules'])}, "
            f"but the adapter of continue_from has {their_config.get('target_modules')}, or is of another base"
        )
    set_peft_model_state_dict(model, theirs, adapter)


def adapter_weights(model: PeftModel, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
    """The tensors that are saved, which work on the base as it is."""
    return as_one(model, get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))


def adapter_config(model: PeftModel, adapter: str = ADAPTER) -> dict[str, Any]:
    """peft's own configuration, with its sets sorted: identical runs write identical bytes."""
    config: PeftConfig = model.peft_config[adapter]
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return config_as_one(model, said)


def save_adapter(model: PeftModel, folder: Path, base_id: str, revision: str | None, adapter: str = ADAPTER) -> None:
    """Writes the weights and the configuration into an existing folder."""
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_weights(model, adapter).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(model, adapter) | {
        "base_model_name_or_path": base_id,
        "revision": revision,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
