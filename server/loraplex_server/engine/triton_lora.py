"""Adds many adapters' LoRA products to a layer's output on a CUDA device: two Triton kernels, shrink and expand.

Every token goes its own way by its slot, whatever its neighbours do. What is launched depends on the number of tokens
and the layer's shape alone, and nothing is read back from the device, so a CUDA graph may hold it. That adapters are
gathered in two steps is Punica's idea (arXiv:2310.18547) and S-LoRA's (arXiv:2311.03285). Knows no peft, no names.

The kernels are made at the first call: Triton comes with torch's CUDA builds and is not needed anywhere else.
"""

from functools import cache
from typing import Any

import torch

from loraplex_server.engine.lora import Along
from loraplex_server.engine.lora_table import LoraTable

# From this many tokens on, tokens are taken in blocks that share the weights they load: a prompt's tokens have one
# adapter. Below, as in decoding, each token may have its own, and each goes alone. A guess: no GPU has run either.
BLOCKED_TOKENS = 64
_BLOCK_TOKENS = 16  # the least that a tensor core multiplies
_BLOCK_IN = 128
_BLOCK_OUT = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonLora:
    """See lora.LoraKernel."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def table(self, layer: Any, slots: int, max_rank: int) -> LoraTable:
        """See LoraKernel."""
        return LoraTable.empty(slots, self.dtype, max_rank, layer.get_base_layer().weight.device)

    def apply(self, base_layer: Any, x: torch.Tensor, along: Along, table: LoraTable) -> torch.Tensor:
        """See LoraKernel."""
        out = base_layer(x)
        add_lora(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), along.slots(x.device), table)
        return out


def add_lora(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable) -> None:
    """``out[t] += scaling[s] * B[s] @ (A[s] @ x[t])`` for every token t whose slot s has something in this layer.

    Sums are in float32, and are rounded once, into ``out``; a token's result does not depend on other tokens.

    Args:
        out: (tokens, out_features), rows of any stride; changed in place. x: (tokens, in_features), likewise.
        slots: (tokens,) int32, each below the table's length; less than 0: no adapter.

    Raises:
        ValueError: a shape, dtype or stride that the kernels do not take; the device is not asked, slots are trusted.
        RuntimeError: Triton is not installed.
    """
    _check(out, x, slots, table)
    tokens, in_features, out_features = len(x), x.shape[1], out.shape[1]
    if not tokens:
        return
    kernels = _kernels()
    blocked = tokens >= BLOCKED_TOKENS
    # More programs for a long dot product; by the layer alone, so that a token's sums do not depend on its company.
    parts = min(8, -(-in_features // 1024))
    block_rank = 16 if table.max_rank <= 16 else 32 if table.max_rank <= 32 else 64
    middle = torch.empty(parts, tokens, table.max_rank, dtype=torch.float32, device=x.device)
    dtypes = {"WEIGHT": _triton_dtype(table.dtype), "PRODUCT": _triton_dtype(_product(x, table))}
    across = -(-tokens // _BLOCK_TOKENS) if blocked else tokens
    shrink, expand = kernels["blocked" if blocked else "single"]
    shrink[across, -(-table.max_rank // block_rank), parts](
        *(middle, x, slots, table.a, table.rank),
        *(tokens, in_features, table.max_rank, x.stride(0)),
        PARTS=parts,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_RANK=block_rank,
        BLOCK_IN=_BLOCK_IN,
        **dtypes,
        enable_fp_fusion=True,  # the default, which Triton warns it will change
    )
    expand[across, -(-out_features // _BLOCK_OUT)](
        *(out, middle, slots, table.b, table.rank, table.scaling),
        *(tokens, out_features, table.max_rank, out.stride(0)),
        PARTS=parts,
        BLOCK_TOKENS=_BLOCK_TOKENS,
        BLOCK_RANK=block_rank,
        BLOCK_OUT=_BLOCK_OUT,
        WEIGHT=dtypes["WEIGHT"],
        enable_fp_fusion=True,
    )


def _check(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable) -> None:
    for name, tensor in (("out", out), ("x", x)):
        if tensor.ndim != 2 or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected (tokens, features) of a float dtype"
            )
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}, expected features that lie side by side")
    if len(out) > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out has strides {out.stride()}, expected rows that do not overlap")
    if len(out) != len(x) or slots.shape != (len(x),) or slots.dtype != torch.int32 or not slots.is_contiguous():
        raise ValueError(
            f"out has {len(out)} tokens, x {len(x)}, slots {tuple(slots.shape)} of {slots.dtype}: "
            "expected as many of each, and int32 slots side by side"
        )
    if table.dtype not in _DTYPES:
        raise ValueError(f"the table's dtype is {table.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def _product(x: torch.Tensor, table: LoraTable) -> torch.dtype:
    """What two factors are turned to before they are multiplied; both fit in it, and their product in float32."""
    if x.device.type == "cpu":  # Triton's interpreter, whose dot product takes bfloat16's bits for integers
        return torch.float32
    return torch.promote_types(x.dtype, table.dtype)


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@cache
def _kernels() -> dict[str, tuple[Any, Any]]:
    """Shrink and expand, for tokens taken singly and for blocks of tokens."""
    try:
        from loraplex_server.engine import lora_kernels
    except ImportError as error:
        raise RuntimeError(
            "adapters on a CUDA device need Triton, which torch's CUDA builds for Linux bring along: " + str(error)
        ) from error
    return {
        "single": (lora_kernels.shrink, lora_kernels.expand),
        "blocked": (lora_kernels.shrink_blocked, lora_kernels.expand_blocked),
    }
