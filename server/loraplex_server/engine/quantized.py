"""How a 4-bit layer multiplies on a CPU, in the fastest way that this machine and the layer allow.

With AMX or AVX-512 BF16, and a compiler: our kernel, which reads 4 bits a weight however many rows there are. Without a
compiler bitsandbytes' fused kernel for few rows, and dequantized and dense for many. On other devices bitsandbytes
chooses by itself. Knows layers and rows.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from loraplex_server.kernels.native import addresses, native

# bitsandbytes' fused kernel takes as long for every row as for the first; dequantizing costs the same however many rows
# follow. They were seen to meet at about six rows on a Xeon with AMX.
FUSED_ROWS = 6
NO_ADAPTERS = (0,) * 7  # of lora.Along.call and LoraTable.call


def choose_kernels(model: torch.nn.Module, ours: bool = True, lean: bool = False) -> None:
    """Give every 4-bit layer on a CPU its way. Layers that bitsandbytes has packed for itself are left alone.

    ``ours``: use our kernel where it can be. ``lean``: where it is not used, keep one layout of the weights instead of
    two, and be slow with many rows.
    """
    library = native().library if ours else None
    for layer in model.modules():
        if not isinstance(layer, Linear4bit) or layer.weight.device.type != "cpu":
            continue
        weight = cast(Params4bit, layer.weight)
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            continue
        if library and fits(layer, weight.quant_state):
            layer.forward = _by_kernel(layer, weight)
        elif has_avx512bf16() and not lean:
            layer.forward = _by_rows(layer, weight, layer.forward)


def fits(layer: Linear4bit, state: Any) -> bool:
    """Whether the kernels take a layer: NF4 in blocks of 64, of a shape that tiles divide, computing in bfloat16."""
    outputs, inputs = state.shape
    return layer.compute_dtype == torch.bfloat16 and state.blocksize == 64 and (inputs % 64, outputs % 32) == (0, 0)


def _by_kernel(layer: Linear4bit, weight: Params4bit) -> Callable[..., torch.Tensor]:
    """Our kernel; the weight is kept as it reads it, and no longer as bitsandbytes does."""
    state: Any = weight.quant_state
    outputs, inputs = state.shape
    codes, scales = pack(weight.data, state)
    codebook = state.code.float()
    weight.data, weight.quant_state = codes, None
    bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
    kernel = native().library.nf4_linear  # pyright: ignore[reportOptionalMemberAccess]
    constant = addresses(codes, scales, bias, codebook)
    vars(layer)["kernel_tensors"] = scales, codebook, bias  # they live as long as the layer that uses their addresses

    def forward(x: torch.Tensor, adapters: tuple[int, ...] = NO_ADAPTERS) -> torch.Tensor:  # (…, in) → (…, out)
        given = x.to(torch.bfloat16).contiguous()
        out = torch.empty(*x.shape[:-1], outputs, dtype=torch.bfloat16)
        kernel(out.data_ptr(), given.data_ptr(), *constant, given.numel() // inputs, inputs, outputs, *adapters)
        return out.to(x.dtype)

    vars(layer)["with_adapters"] = forward
    return forward


def pack(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8, as many bytes as before) and scales (float32, one for 64 weights) as kernels/nf4.c reads them."""
    outputs, inputs = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = absmax.float().view(outputs // 16, 16, inputs // 64).transpose(1, 2).contiguous()
    codes = torch.stack([weight.view(-1) >> 4, weight.view(-1) & 15], 1)  # the first of two weights is in the high bits
    codes = codes.view(outputs // 16, 16, inputs // 64, 2, 32)  # tile, output, block, half, input
    low, high = codes.permute(3, 0, 2, 1, 4)
    return (low | high << 4).contiguous(), scales


def _by_rows(layer: Linear4bit, weight: Params4bit, fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``fused`` packs the layer's weight for itself at its first call, so the plain one is taken along here."""
    plain, state = weight.data, copy.deepcopy(weight.quant_state)

    def forward(x: torch.Tensor) -> torch.Tensor:  # (…, in) → (…, out)
        if x.shape[:-1].numel() <= FUSED_ROWS:
            return fused(x)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return torch.nn.functional.linear(x, dequantize_4bit(plain, state).to(x.dtype), bias)

    return forward
