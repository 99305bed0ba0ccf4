"""How large an adapter will be, to the byte, before anything is trained: it may be on a base without numbers.

Knows safetensors' format: https://github.com/huggingface/safetensors#format
"""

import json
from dataclasses import dataclass

import torch
from peft import PeftModel

from loraplex_trainer.adapter import adapter_weights, trainable_parameters


@dataclass(frozen=True)
class AdapterSize:
    """`parameters` are trained; `tensor_bytes` are those of what is saved, `file_bytes` of its safetensors file."""

    parameters: int
    tensor_bytes: int
    file_bytes: int


def adapter_size(model: PeftModel) -> AdapterSize:
    """Of a model with its adapter, on any device."""
    if model.device.type == "meta":
        if model.peft_config["default"].is_prompt_learning:
            model.prompt_encoder.to_empty(device="cpu")  # peft computes what it saves
        else:
            model.to("meta")  # peft leaves a second adapter on the CPU
    weights = adapter_weights(model)
    tensor_bytes = sum(tensor.nbytes for tensor in weights.values())
    parameters = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return AdapterSize(parameters, tensor_bytes, 8 + _header_bytes(weights) + tensor_bytes)


def _header_bytes(weights: dict[str, torch.Tensor]) -> int:
    """Of the JSON before the tensors, as safetensors writes it: by name, since all are float32, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in sorted(weights.items()):
        assert tensor.dtype == torch.float32
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return -(-length // 8) * 8
