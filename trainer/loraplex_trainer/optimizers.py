"""The optimizer of a run: made from its settings, and its state as plain tensors and numbers for a checkpoint.

Knows torch, bitsandbytes and transformers; nothing of losses, steps or files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, AdamW32bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from transformers.optimization import Adafactor

from loraplex_trainer.sections import TrainingSection

Parameters = Mapping[str, torch.nn.Parameter]


def build_optimizer(
    groups: Sequence[dict[str, Any]], training: TrainingSection, device: torch.device
) -> torch.optim.Optimizer:
    """`training.optimizer` over groups of parameters (see adapter.rate_groups).

    A paged one pages on a GPU; on a CPU there is nothing to page out of.
    """
    rate, decay = training.learning_rate, training.weight_decay
    adam = {"lr": rate, "betas": training.betas, "eps": training.eps, "weight_decay": decay}
    paged = training.optimizer.startswith("paged_") and device.type == "cuda"
    match training.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **adam, fused=True)
        case "adamw_8bit" | "paged_adamw_8bit":
            return AdamW8bit(groups, **adam, is_paged=paged)
        case "paged_adamw_32bit":
            return AdamW32bit(groups, **adam, is_paged=paged)
        case "adafactor":
            # By the schedule's rate alone: scaled by its own norm, lora_B, which starts at zero, would hardly move.
            return Adafactor(groups, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=training.momentum, weight_decay=decay)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Every value of the state by `<kind>/<key>/<parameter>`; a Python number is a tensor of kind `number`."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer/{key}/{name}"] = value
            elif value is not None:
                state[f"number/{key}/{name}"] = torch.tensor(value)
    return state


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Parameters, saved: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_state` gave, on the parameters' device."""
    values: dict[str, dict[str, torch.Tensor | int | float]] = {name: {} for name in parameters}
    for path, tensor in saved.items():
        kind, key, name = path.split("/", 2)
        values[name][key] = tensor if kind == "optimizer" else tensor.item()
    if isinstance(optimizer, Optimizer8bit):
        _fill(optimizer, parameters, values)
        return
    state = {index: values[name] for index, name in enumerate(parameters)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fill(
    optimizer: Optimizer8bit, parameters: Parameters, values: dict[str, dict[str, torch.Tensor | int | float]]
) -> None:
    """Copies into the buffers that bitsandbytes makes: its own load_state_dict would put paged ones into GPU memory."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if not (saved := values[names[id(parameter)]]):
                continue
            optimizer.init_state(group, parameter, group_index, index)
            for key, value in saved.items():
                if isinstance(value, torch.Tensor):
                    optimizer.state[parameter][key].copy_(value)
                else:
                    optimizer.state[parameter][key] = value
