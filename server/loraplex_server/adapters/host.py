"""An adapter in host memory: read from a folder, checked whole against the base, ready to be put on the device."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from loraplex_registry.base import BaseDescription
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.validate import Limits, check_adapter
from loraplex_server.engine.errors import AdapterRefused


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


def read_adapter(key: str, folder: Path, base: BaseDescription, max_rank: int) -> HostAdapter:
    """Read an adapter folder that fits ``base``.

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
    return HostAdapter(key, config, load_file(folder / "adapter_model.safetensors"))
