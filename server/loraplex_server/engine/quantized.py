"""How a 4-bit layer multiplies on a CPU: by bitsandbytes' fused kernel for few rows, dequantized and dense for many.

Knows layers and row counts. On other devices bitsandbytes chooses by itself, and nothing here is used.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Params4bit

# The fused kernel takes as long for every row as for the first; dequantizing costs the same however many rows follow.
# They were seen to meet at about six rows on a Xeon with AMX.
FUSED_ROWS = 6


def choose_by_rows(model: torch.nn.Module) -> None:
    """Let every 4-bit layer choose its way anew in each forward. The packed and the plain 4-bit weights are both kept.

    Does nothing where there is no fused kernel, and to layers that were packed already.
    """
    if not has_avx512bf16():
        return
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and layer.weight.device.type == "cpu":
            weight = cast(Params4bit, layer.weight)
            if not getattr(weight.quant_state, "packing_format_for_cpu", False):
                layer.forward = _by_rows(layer, weight, layer.forward)


def _by_rows(layer: Linear4bit, weight: Params4bit, fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``fused`` packs the layer's weight for itself at its first call, so the plain one is taken along here."""
    plain, state = weight.data, copy.deepcopy(weight.quant_state)

    def forward(x: torch.Tensor) -> torch.Tensor:  # (…, in) → (…, out)
        if x.shape[:-1].numel() <= FUSED_ROWS:
            return fused(x)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return torch.nn.functional.linear(x, dequantize_4bit(plain, state).to(x.dtype), bias)

    return forward
