"""Host memory for adapters, handed on from one that was evicted to the next that comes. Knows sizes, no adapters.

The first touch of pages that the system gives anew costs as much as reading the file, on a virtual machine several
times as much, and that while others compute. One block waits at most; what is unloaded goes back to the system at once.
"""

from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from weakref import finalize

import torch


@dataclass(eq=False)
class Block:
    """Memory that a tensor lies in, and whether it is to be kept when the last view of that tensor is gone."""

    area: mmap
    kept: bool = False

    def hand_on(self) -> None:
        """Let the next adapter have it, once nobody uses it any more."""
        self.kept = True


class HostMemory:
    """Blocks for tensors; each belongs to its tensor until torch has let go of it."""

    def __init__(self) -> None:
        self._spare: list[Block] = []  # one at most; only appended to and popped from, whatever thread that happens on

    def bfloat16(self, count: int) -> tuple[torch.Tensor, Block]:
        """A flat tensor of so many values, which are anything, and the block that it lies in."""
        block = self._block(max(count, 1) * 2)
        view = memoryview(block.area)  # torch keeps it as long as the tensor's storage, and it can be watched
        finalize(view, self._left, block).atexit = False
        return torch.frombuffer(view, dtype=torch.bfloat16, count=count), block

    def _block(self, size: int) -> Block:
        if self._spare:
            area = self._spare.pop().area
            if size <= len(area) <= 2 * size:
                return Block(area)
        return Block(mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS))

    def _left(self, block: Block) -> None:
        if block.kept and not self._spare:
            self._spare.append(block)
