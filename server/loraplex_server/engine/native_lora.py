"""Adds many adapters' LoRA products to a layer's output on a CPU, by kernels/linear.c. See lora.LoraKernel."""

from typing import Any

import torch

from loraplex_server.engine.lora import Along
from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.kernels.native import addresses, native


class NativeLora:
    """In bfloat16, as the base's activations are."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self._add = native().library.lora_add  # pyright: ignore[reportOptionalMemberAccess]

    def table(self, layer: Any, slots: int, max_rank: int) -> LoraTable | None:
        """See LoraKernel."""
        if layer.in_features % 32 or layer.out_features % 32:
            return None
        return LoraTable.empty(slots, self.dtype, max_rank, torch.device("cpu"))

    def apply(self, base_layer: Any, x: torch.Tensor, along: Along, table: LoraTable) -> torch.Tensor:
        """See LoraKernel. A 4-bit layer of ours adds to its sums before it rounds them; to others we add afterwards."""
        adapters = along.call + table.call
        if fused := getattr(base_layer, "with_adapters", None):
            return fused(x, adapters)
        out, given = base_layer(x), x.contiguous()
        assert out.dtype == given.dtype == torch.bfloat16 and out.is_contiguous()
        self._add(*addresses(out, given), along.tokens, x.shape[-1], out.shape[-1], *adapters)
        return out
