"""An adapter in host memory: read from a folder, checked whole against the base, ready to be put on the device."""

import os
from ctypes import addressof, c_double
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.receipt import Receipt
from loraplex_registry.tensors import TensorInfo
from loraplex_registry.validate import WEIGHTS, CheckedAdapter, Limits, check_adapter
from loraplex_server.adapters.memory import Block, HostMemory
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.kernels.native import addresses, native

_PIECE = 1 << 14  # values; torch computes as few on the thread that asks
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # all that check_adapter lets pass
_KINDS = {dtype: kind for kind, dtype in enumerate(_DTYPES)}  # as load.c numbers them
_ALIGNED = 32  # values of bfloat16 in a line of the cache


@dataclass(frozen=True)
class HostAdapter:
    """The tensors of one adapter, keyed as in its file, and the configuration peft builds its layers from."""

    key: str  # what the engine calls it: a digest, or a local name
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    block: Block | None = None  # where all tensors lie, if that is one place
    receipt: Receipt = field(default_factory=Receipt)  # an empty one, where the adapter has none

    @cached_property
    def host_bytes(self) -> int:
        """Memory the tensors take."""
        return sum(t.nbytes for t in self.tensors.values())

    def evicted(self) -> None:
        """Another is to have the memory."""
        if self.block:
            self.block.hand_on()


@dataclass
class AdapterReader:
    """Reads adapters that fit ``base``, on any thread.

    ``pin``: lock their pages, from where a CUDA device copies by itself. ``dtype``: what the tensors are to become, so
    that a CPU has nothing to copy when it uses them; None: they stay.
    """

    base: BaseDescription
    max_rank: int
    pin: bool = False
    dtype: torch.dtype | None = None
    share: c_double = field(default_factory=lambda: c_double(1))  # of the time, while others compute on the same cores
    memory: HostMemory = field(default_factory=HostMemory)

    def read(self, key: str, folder: Path) -> HostAdapter:
        """Read an adapter folder, whole and checked.

        Raises:
            AdapterRefused: it is not a LoRA adapter this server can use whole on this base; the message says why.
        """
        try:
            adapter = self._in_one_call(key, folder) if self.dtype == torch.bfloat16 and native() else None
            return adapter or self._tensor_by_tensor(key, folder)
        except InvalidAdapter as error:
            raise AdapterRefused(str(error)) from error

    def _in_one_call(self, key: str, folder: Path) -> HostAdapter | None:
        """By our kernel, in bfloat16; None when a value is no such number: the other way says which, and why.

        A load of many small calls waits for the interpreter after each of them: seconds in all, beside a busy engine.
        """
        checked = self._check(folder, values=False)  # nor are the files' digests asked for
        header = checked.tensors
        counts = [prod(info.shape) for info in header.values()]
        starts = [0, *accumulate(-(-count // _ALIGNED) * _ALIGNED for count in counts)]
        flat, block = self.memory.bfloat16(starts.pop())
        kinds = [_KINDS[info.dtype] for info in header.values()]
        table = torch.tensor([[info.begin for info in header.values()], counts, kinds, starts])  # (4, tensors) int64
        load: Any = native().library
        file = folder / WEIGHTS
        with file.open("rb") as stream:
            where = flat.data_ptr(), len(counts), *addresses(*table), addressof(self.share)
            failed = load.load_bf16(stream.fileno(), *where)
        if failed > 0:
            raise OSError(failed, os.strerror(failed), str(file))
        if failed:
            return None
        parts = zip(header.items(), counts, starts, strict=True)
        tensors = {name: flat[start : start + count].view(info.shape) for (name, info), count, start in parts}
        return HostAdapter(key, _config(folder), tensors, block, checked.receipt)

    def _tensor_by_tensor(self, key: str, folder: Path) -> HostAdapter:
        checked = self._check(folder, values=True)
        mapped = _mapped(folder / WEIGHTS, checked.tensors).items()
        tensors = {name: _in_memory(name, tensor, self.pin, self.dtype or tensor.dtype) for name, tensor in mapped}
        return HostAdapter(key, _config(folder), tensors, receipt=checked.receipt)

    def _check(self, folder: Path, values: bool) -> CheckedAdapter:
        return check_adapter(folder, self.base, Limits(max_rank=self.max_rank), files=(), values=values)


def _config(folder: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)  # check_adapter refuses every other kind
    config.inference_mode = True
    return config


def _mapped(file: Path, header: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """The tensors of a checked file, each a view of it.

    Not by safetensors' torch side: get_tensor, in 0.8.0, never frees two small objects of each tensor it reads.
    """
    with file.open("rb") as stream:
        area = mmap(stream.fileno(), 0, access=ACCESS_COPY)  # torch warns of what it must not write to

    def view(info: TensorInfo) -> torch.Tensor:
        flat = torch.frombuffer(area, dtype=_DTYPES[info.dtype], count=prod(info.shape), offset=info.begin)
        return flat.view(info.shape)

    return {key: view(info) for key, info in header.items()}


def _in_memory(key: str, mapped: torch.Tensor, pin: bool, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a tensor that is a view of its file: read here, on a background thread, not when it is first used.

    By numpy, or in small pieces: torch would start threads, and they compete with the engine's. And in few calls: after
    each, this thread waits for the interpreter while the engine has it.
    """
    held = torch.empty(mapped.shape, dtype=dtype, pin_memory=pin)
    if mapped.dtype == dtype:
        np.copyto(held.view(torch.uint8).numpy(), mapped.view(torch.uint8).numpy())
        return held
    most = torch.finfo(dtype).max
    if most < torch.finfo(mapped.dtype).max and max(mapped.numpy().max(), -mapped.numpy().min()) > most:
        raise AdapterRefused(f"tensor {key!r} holds values beyond {most:.3g}, the most of {dtype}")
    for to, given in zip(held.view(-1).split(_PIECE), mapped.view(-1).split(_PIECE), strict=True):
        to.copy_(given)
    return held
