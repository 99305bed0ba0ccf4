"""An adapter in host memory: read from a folder, checked whole against the base, ready to be put on the device."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.validate import Limits, check_adapter
from loraplex_server.engine.errors import AdapterRefused

_PIECE = 1 << 14  # values; torch computes as few on the thread that asks


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


def read_adapter(key: str, folder: Path, base: BaseDescription, max_rank: int, pin: bool = False) -> HostAdapter:
    """Read an adapter folder that fits ``base``; ``pin`` locks its pages, from where a CUDA device copies by itself.

    Raises:
        AdapterRefused: it is not a LoRA adapter this server can use whole on this base; the message says why.
    """
    try:
        check_adapter(folder, base, Limits(max_rank=max_rank))
    except InvalidAdapter as error:
        raise AdapterRefused(str(error)) from error
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)  # check_adapter refuses every other kind
    config.inference_mode = True
    mapped = load_file(folder / "adapter_model.safetensors")
    return HostAdapter(key, config, {key: _in_memory(tensor, pin) for key, tensor in mapped.items()})


def _in_memory(mapped: torch.Tensor, pin: bool) -> torch.Tensor:
    """A copy of a tensor that is a view of its file: read here, on a background thread, not when it is first used.

    By numpy, which lets other threads run and starts none of its own, as torch would beside the engine's.
    """
    held = torch.empty(mapped.shape, dtype=mapped.dtype, pin_memory=pin)
    np.copyto(held.view(torch.uint8).numpy(), mapped.view(torch.uint8).numpy())
    return held


def cast(adapter: HostAdapter, dtype: torch.dtype) -> HostAdapter:
    """The adapter as the device will hold it, so that on a CPU nothing is copied when it is put there.

    In pieces too small for torch to start threads for, which would compete with the engine's.

    Raises:
        AdapterRefused: a value is too large for ``dtype``.
    """

    def one(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == dtype:
            return tensor
        held = torch.empty(tensor.shape, dtype=dtype)
        for to, given in zip(held.view(-1).split(_PIECE), tensor.view(-1).split(_PIECE), strict=True):
            if not to.copy_(given).isfinite().all():
                most = torch.finfo(dtype).max
                raise AdapterRefused(f"tensor {key!r} holds values beyond {most:.3g}, the most of {dtype}")
        return held

    return HostAdapter(adapter.key, adapter.config, {key: one(key, tensor) for key, tensor in adapter.tensors.items()})
