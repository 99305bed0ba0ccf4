"""Where one LoRA layer's weights lie, adapter slot by adapter slot: what the kernels of every device read.

The tables are written when an adapter comes or goes, never by a step. Knows no names, no peft and no kernels.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class LoraTable:
    """One layer's adapters; a slot has the same number in every layer.

    The pointers are addresses on the tables' own device, of weights that somebody else keeps alive. Each is a multiple
    of 16 bytes, as torch's allocators give them: the CUDA kernels load that many at once.
    """

    a: torch.Tensor  # (slots,) int64: address of A, row-major (rank, in_features); 0: nothing here for the slot
    b: torch.Tensor  # (slots,) int64: address of B, row-major (out_features, rank)
    rank: torch.Tensor  # (slots,) int32; 0: nothing here for the slot
    scaling: torch.Tensor  # (slots,) float32
    dtype: torch.dtype  # of every A and B
    max_rank: int  # no rank is higher; a captured CUDA graph holds on to it

    @classmethod
    def empty(cls, slots: int, dtype: torch.dtype, max_rank: int, device: torch.device) -> "LoraTable":
        """A table in which no slot has anything."""
        a, b = torch.zeros(2, slots, dtype=torch.int64, device=device)
        rank = torch.zeros(slots, dtype=torch.int32, device=device)
        return cls(a, b, rank, torch.zeros(slots, device=device), dtype, max_rank)

    @cached_property
    def call(self) -> tuple[int, ...]:
        """The table as the kernels for CPUs take it: addresses, which never change, and the highest rank."""
        return (*(tensor.data_ptr() for tensor in (self.a, self.b, self.rank, self.scaling)), self.max_rank)
