"""Adds many adapters' LoRA products to a layer's output on a CPU with AMX, by kernels/lora.c. See lora.LoraKernel."""

from typing import Any

import torch

from loraplex_server.engine.lora import Along
from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.kernels.native import addresses, native


class AmxLora:
    """In bfloat16, as the base's activations are. B lies as (rank, outputs)."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self._add = native().library.lora_add  # pyright: ignore[reportOptionalMemberAccess]

    def table(self, layer: Any, slots: int, max_rank: int) -> LoraTable | None:
        """See LoraKernel."""
        if layer.in_features % 32 or layer.out_features % 64:
            return None
        return LoraTable.empty(slots, self.dtype, max_rank, torch.device("cpu"))

    def arranged(self, b: torch.Tensor) -> torch.Tensor:
        """See LoraKernel."""
        return b.t().contiguous().t()

    def add(self, out: torch.Tensor, x: torch.Tensor, along: Along, table: LoraTable) -> None:
        """See LoraKernel. Both bfloat16."""
        given = x.contiguous()
        assert out.dtype == given.dtype == torch.bfloat16 and out.is_contiguous()
        self._add(
            *addresses(out, given, along.runs),
            *(len(along.runs), *table.addresses),
            *(along.tokens, x.shape[-1], out.shape[-1], table.max_rank),
        )
