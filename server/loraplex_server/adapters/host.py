"""An adapter in host memory: read from a folder, checked whole against the base, ready to be put on the device."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from mmap import ACCESS_COPY, mmap
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.tensors import TensorInfo, read_header
from loraplex_registry.validate import WEIGHTS, Limits, check_adapter
from loraplex_server.engine.errors import AdapterRefused

_PIECE = 1 << 14  # values; torch computes as few on the thread that asks
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # all that check_adapter lets pass


@dataclass(frozen=True)
class HostAdapter:
    """The tensors of one adapter, keyed as in its file, and the configuration peft builds its layers from."""

    key: str  # what the engine calls it: a digest, or a local name
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @cached_property
    def host_bytes(self) -> int:
        """Memory the tensors take."""
        return sum(t.nbytes for t in self.tensors.values())


def read_adapter(
    key: str,
    folder: Path,
    base: BaseDescription,
    max_rank: int,
    pin: bool = False,
    dtype: torch.dtype | None = None,
) -> HostAdapter:
    """Read an adapter folder that fits ``base``; ``pin`` locks its pages, from where a CUDA device copies by itself.

    ``dtype``: what the tensors are to become, so that a CPU has nothing to copy when it uses them; None: they stay.

    Raises:
        AdapterRefused: it is not a LoRA adapter this server can use whole on this base; the message says why.
    """
    try:
        check_adapter(folder, base, Limits(max_rank=max_rank), files=())  # their digests are not asked for
    except InvalidAdapter as error:
        raise AdapterRefused(str(error)) from error
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)  # check_adapter refuses every other kind
    config.inference_mode = True
    tensors = _mapped(folder / WEIGHTS)
    return HostAdapter(key, config, {key: _in_memory(key, t, pin, dtype or t.dtype) for key, t in tensors.items()})


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checked file, each a view of it.

    Not by safetensors' torch side: get_tensor, in 0.8.0, never frees two small objects of each tensor it reads.
    """
    header = read_header(file)
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
