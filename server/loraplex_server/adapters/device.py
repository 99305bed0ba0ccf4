"""The adapters inside the served PeftModel: put in through peft, made active by set_adapter, taken out by deletion.

Owns the model's adapters; called by the engine's thread alone, between two forwards.
"""

from itertools import count

from peft import LoraModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from transformers.modeling_utils import PreTrainedModel

from loraplex_server.adapters.host import HostAdapter
from loraplex_server.engine.errors import AdapterRefused


class DeviceAdapters:
    """Adapters of one model by key. ``model`` is what a forward calls: the bare base until the first adapter comes."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.model: PreTrainedModel | PeftModelForCausalLM = base
        self._names: dict[str, str] = {}  # key -> peft's name for it
        self._numbers = count()
        self._active: str | None = None  # peft's name; None: no adapter

    def install(self, adapter: HostAdapter) -> None:
        """Put an adapter on the device.

        Raises:
            AdapterRefused: peft did not take every tensor to its place; nothing of the adapter stays.
        """
        name = f"adapter_{next(self._numbers)}"
        self._names[adapter.key] = name
        try:
            self._inject(name, adapter)
            self._check_whole(name, adapter)
        except (AdapterRefused, RuntimeError, ValueError, KeyError) as error:
            self.remove(adapter.key)
            raise AdapterRefused(f"peft cannot use it on this base: {error}") from error

    def remove(self, key: str) -> None:
        """Take an adapter off the device; its memory is free when this returns."""
        name = self._names.pop(key)
        self.activate(None)  # peft would make another adapter active in place of a deleted one
        if isinstance(self.model, PeftModelForCausalLM) and name in self.model.peft_config:
            self.model.delete_adapter(name)
            _tuner(self.model).set_adapter([], inference_mode=True)

    def activate(self, key: str | None) -> None:
        """Make one adapter, or none, the active one: the swap."""
        name = None if key is None else self._names[key]
        if name == self._active or not isinstance(self.model, PeftModelForCausalLM):
            return
        if name is None:
            _tuner(self.model).set_adapter([], inference_mode=True)
        else:
            self.model.set_adapter(name, inference_mode=True)
        self._active = name

    def _inject(self, name: str, adapter: HostAdapter) -> None:
        if isinstance(self.model, PeftModelForCausalLM):
            self.model.add_adapter(name, adapter.config, low_cpu_mem_usage=True)
        else:
            self.model = PeftModelForCausalLM(self.model, adapter.config, name, low_cpu_mem_usage=True)
        model: PeftModelForCausalLM = self.model
        tensors = {key: tensor.to(model.device) for key, tensor in adapter.tensors.items()}
        set_peft_model_state_dict(model, tensors, adapter_name=name, low_cpu_mem_usage=True)
        _tuner(model)._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)  # as peft's loader does
        _tuner(model).set_adapter([], inference_mode=True)
        model.eval()
        self._active = None

    def _check_whole(self, name: str, adapter: HostAdapter) -> None:
        """Every tensor of the file is in the model, and the model has no LoRA tensor that the file lacks."""
        held = get_peft_model_state_dict(self.model, adapter_name=name)
        if held.keys() != adapter.tensors.keys():
            odd = sorted(held.keys() ^ adapter.tensors.keys())
            raise AdapterRefused(f"{len(odd)} tensors have no counterpart, the first is {odd[0]!r}")
        for key, tensor in adapter.tensors.items():
            if held[key].is_meta or held[key].shape != tensor.shape:
                raise AdapterRefused(f"tensor {key!r} was not taken: expected shape {tuple(tensor.shape)}")


def _tuner(model: PeftModelForCausalLM) -> LoraModel:
    tuner = model.base_model
    assert isinstance(tuner, LoraModel)  # only LoRA adapters get here
    return tuner
